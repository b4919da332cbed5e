//! gRPC through two sidecars: every kind of call, trailers, statuses, and a foreign client.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "tests: a failure here is a failed test, and a test may tell a long story"
)]

use std::pin::Pin;
use std::process::Command;
use std::time::Duration;

use duet_tests::mesh::{ControlPlane, Options, Sidecar};
use duet_tests::{SOON, metrics, tools};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    missing_debug_implementations,
    reason = "generated"
)]
#[allow(
    clippy::all,
    clippy::missing_errors_doc,
    clippy::clone_on_ref_ptr,
    clippy::allow_attributes_without_reason,
    clippy::wildcard_imports,
    clippy::doc_markdown,
    reason = "generated"
)]
mod proto {
    tonic::include_proto!("duet.test");
}
use proto::Message;
use proto::echo_client::EchoClient;
use proto::echo_server::{Echo, EchoServer};

type Messages = Pin<Box<dyn Stream<Item = Result<Message, Status>> + Send>>;

fn message(text: &str) -> Message {
    Message { text: text.to_owned() }
}

struct Server;

#[tonic::async_trait]
impl Echo for Server {
    async fn unary(&self, request: Request<Message>) -> Result<Response<Message>, Status> {
        let text = request.get_ref().text.clone();
        match text.as_str() {
            "fail" => {
                let mut status = Status::failed_precondition("as asked: 100 %");
                status.metadata_mut().insert("x-trailer", "seen".parse().unwrap());
                Err(status)
            }
            "slow" => {
                tokio::time::sleep(Duration::from_secs(20)).await;
                Ok(Response::new(message("too late")))
            }
            text => {
                let mut response = Response::new(message(text));
                response.metadata_mut().insert("x-header", "seen".parse().unwrap());
                Ok(response)
            }
        }
    }

    type DownloadStream = Messages;
    async fn download(&self, request: Request<Message>) -> Result<Response<Messages>, Status> {
        let text = request.into_inner().text;
        let numbered = (0..100).map(move |n| Ok(message(&format!("{text} {n}"))));
        let end = std::iter::once(Err(Status::data_loss("the end")));
        Ok(Response::new(Box::pin(tokio_stream::iter(numbered.chain(end)))))
    }

    async fn upload(
        &self,
        request: Request<Streaming<Message>>,
    ) -> Result<Response<Message>, Status> {
        let mut messages = request.into_inner();
        let mut length = 0;
        while let Some(message) = messages.message().await? {
            length += message.text.len();
        }
        Ok(Response::new(message(&length.to_string())))
    }

    type ChatStream = Messages;
    async fn chat(
        &self,
        request: Request<Streaming<Message>>,
    ) -> Result<Response<Messages>, Status> {
        let answers = request
            .into_inner()
            .map(|message| message.map(|message| Message { text: message.text.to_uppercase() }));
        Ok(Response::new(Box::pin(answers)))
    }
}

struct Mesh {
    _control_plane: ControlPlane,
    _server: Sidecar,
    caller: Sidecar,
    serving: tokio::task::JoinHandle<()>,
}

impl Mesh {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(async move {
            let server = tonic::transport::Server::builder().add_service(EchoServer::new(Server));
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        let control_plane = ControlPlane::start(&[]).await;
        let server = Sidecar::ready(&control_plane, Options::service("echo", port)).await;
        let caller = Sidecar::ready(&control_plane, Options::client("caller")).await;
        Self { _control_plane: control_plane, _server: server, caller, serving }
    }

    /// A client whose calls are for `service`, through the caller's sidecar.
    fn client(&self, service: &str) -> EchoClient<Channel> {
        let outbound = self.caller.ports.outbound;
        let connector = tower::service_fn(move |_: http::Uri| async move {
            let stream = tokio::net::TcpStream::connect(outbound).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        });
        let endpoint = Endpoint::from_shared(format!("http://{service}")).unwrap();
        EchoClient::new(endpoint.connect_with_connector_lazy(connector))
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

#[tokio::test]
async fn unary_calls_carry_metadata_statuses_and_trailers() {
    let mesh = Mesh::start().await;
    let mut client = mesh.client("echo");
    let response = client.unary(message("hello")).await.unwrap();
    assert_eq!(response.metadata().get("x-header").unwrap(), "seen");
    assert_eq!(response.get_ref().text, "hello");

    let status = client.unary(message("fail")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "as asked: 100 %"));
    assert_eq!(status.metadata().get("x-trailer").unwrap(), "seen");

    let mut request = Request::new(message("slow"));
    request.set_timeout(Duration::from_millis(300));
    let status = client.unary(request).await.unwrap_err();
    assert!(matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded), "{status:?}");

    let status = mesh.client("nobody").unary(message("x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("destination_not_found"), "{status:?}");
    let labels = [("grpc_status", "9"), ("direction", "outbound")];
    assert!(metrics::sum(mesh.caller.ports.metrics, "duet_requests_total", &labels).await >= 1.0);
}

#[tokio::test]
async fn streams_flow_in_both_directions() {
    let mesh = Mesh::start().await;
    let mut client = mesh.client("echo");

    let mut download = client.download(message("n")).await.unwrap().into_inner();
    for n in 0..100 {
        assert_eq!(download.message().await.unwrap().unwrap().text, format!("n {n}"));
    }
    let end = download.message().await.unwrap_err();
    assert_eq!((end.code(), end.message()), (Code::DataLoss, "the end"));

    let large = "x".repeat(100_000);
    let upload = tokio_stream::iter((0..20).map(move |_| message(&large)));
    assert_eq!(client.upload(upload).await.unwrap().get_ref().text, "2000000");

    // The second question is asked only after the first answer: nothing on the way may wait for the end.
    let (ask, questions) = mpsc::channel(1);
    let chat = client.chat(ReceiverStream::new(questions));
    ask.send(message("first")).await.unwrap();
    let mut answers = tokio::time::timeout(SOON, chat).await.unwrap().unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().text, "FIRST");
    ask.send(message("second")).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().text, "SECOND");
    drop(ask);
    assert!(answers.message().await.unwrap().is_none());
}

/// A client of another family: gRPC's C core, by Python's `grpcio`.
const FOREIGN: &str = r#"
import sys, grpc
channel = grpc.insecure_channel(sys.argv[1], options=[("grpc.default_authority", "echo")])
def text(value):
    data = value.encode()
    return b"\x0a" + bytes([len(data)]) + data
same = dict(request_serializer=bytes, response_deserializer=bytes)
assert channel.unary_unary("/duet.test.Echo/Unary", **same)(text("hello"), timeout=20) == text("hello")
answers = channel.stream_stream("/duet.test.Echo/Chat", **same)(iter([text("a"), text("b")]), timeout=20)
assert list(answers) == [text("A"), text("B")]
try:
    channel.unary_unary("/duet.test.Echo/Unary", **same)(text("fail"), timeout=20)
    sys.exit("no error")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
    assert ("x-trailer", "seen") in [tuple(pair) for pair in error.trailing_metadata()], error
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_grpc_client_works_too() {
    let Some(python) = tools::find("python") else { return };
    let has_grpc = Command::new(&python).args(["-c", "import grpc"]).output().unwrap();
    if !has_grpc.status.success() {
        tools::skip("Python's grpcio is missing; run scripts/test-deps.sh");
        return;
    }
    let mesh = Mesh::start().await;
    let outbound = mesh.caller.ports.outbound.to_string();
    let client =
        Command::new(&python).args(["-c", FOREIGN, &outbound]).env_remove("http_proxy").output();
    let output = client.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
