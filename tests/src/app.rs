//! Applications that a test serves itself.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, Version};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// What an application was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Method.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Asked {
    /// A header's value, empty where there is none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// Decides on an answer.
pub type Answer = Arc<dyn Fn(&Asked) -> Reply + Send + Sync>;

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: Vec<(&'static str, String)>,
    /// Body.
    pub body: String,
    /// Time that it takes.
    pub delay: Duration,
    /// How many answers are worked on at once; the others wait.
    pub workers: Option<Arc<Semaphore>>,
}

impl Reply {
    /// At once.
    #[must_use]
    pub fn new(status: u16, body: &str) -> Self {
        let status = StatusCode::from_u16(status).unwrap();
        let (headers, delay) = (Vec::new(), Duration::ZERO);
        Self { status, headers, body: body.to_owned(), delay, workers: None }
    }

    /// With a header.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    /// After a while.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    async fn send(self) -> Response {
        let _turn = match &self.workers {
            Some(workers) => Some(workers.acquire().await.unwrap()),
            None => None,
        };
        tokio::time::sleep(self.delay).await;
        let mut response = (self.status, self.body).into_response();
        for (name, value) in self.headers {
            response.headers_mut().append(name, value.parse().unwrap());
        }
        response
    }
}

/// An application on a port of 127.0.0.1, served by the test.
#[derive(Debug)]
pub struct App {
    /// Where.
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    task: JoinHandle<()>,
}

/// What an application was asked.
#[derive(Clone, Debug)]
pub struct History(Arc<Mutex<Vec<Asked>>>);

impl History {
    /// So far, but for `GET /dapr/subscribe`.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        let asked = self.0.lock().unwrap().clone();
        asked.into_iter().filter(|asked| asked.path != "/dapr/subscribe").collect()
    }
}

#[derive(Clone)]
struct Shared {
    name: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    answer: Option<Answer>,
}

impl App {
    /// An application that answers with what it was asked, as JSON. `/status/N` answers with that status,
    /// `/delay/MS` after a while.
    pub async fn echo(name: &str) -> Self {
        Self::start(name, None, "127.0.0.1:0".parse().unwrap()).await
    }

    /// An application that answers as `answer` says.
    pub async fn answering(
        answer: impl Fn(&Asked) -> (StatusCode, String) + Send + Sync + 'static,
    ) -> Self {
        Self::replying(move |asked| {
            let (status, body) = answer(asked);
            Reply::new(status.as_u16(), &body)
        })
        .await
    }

    /// The same with everything that an answer can have.
    pub async fn replying(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::start("app", Some(Arc::new(answer)), "127.0.0.1:0".parse().unwrap()).await
    }

    /// The same at a given address.
    pub async fn start(name: &str, answer: Option<Answer>, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let shared = Shared { name: name.to_owned(), asked: Arc::clone(&asked), answer };
        let router = Router::new().fallback(handle).with_state(shared);
        let router = router.layer(axum::extract::DefaultBodyLimit::disable());
        let task = tokio::spawn(async move {
            axum::serve(listener, router).await.ok();
        });
        Self { address, asked, task }
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// What it was asked so far, but for `GET /dapr/subscribe`.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        self.history().asked()
    }

    /// What it was asked, to be read even after its end.
    #[must_use]
    pub fn history(&self) -> History {
        History(Arc::clone(&self.asked))
    }

    /// Stops listening. Connections that are open may still be served.
    pub async fn stop(self) {
        self.task.abort();
        let address = self.address;
        drop(self);
        crate::eventually("the application is gone", crate::SOON, || async move {
            tokio::net::TcpStream::connect(address).await.is_err().then_some(())
        })
        .await;
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn handle(
    State(shared): State<Shared>,
    (method, uri, version): (Method, Uri, Version),
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    let asked = Asked { method, path: path.clone(), headers, body };
    shared.asked.lock().unwrap().push(asked.clone());
    if let Some(answer) = &shared.answer {
        return answer(&asked).send().await;
    }
    if let Some(ms) = path.strip_prefix("/delay/").and_then(|ms| ms.parse().ok()) {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    let status = path.strip_prefix("/status/").and_then(|code| code.parse::<u16>().ok());
    let status = status.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::OK);
    let status = if path == "/dapr/subscribe" { StatusCode::NOT_FOUND } else { status };
    let headers: Vec<(String, String)> = asked
        .headers
        .iter()
        .map(|(name, value)| {
            (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
        })
        .collect();
    let answer = json!({
        "app": shared.name,
        "version": format!("{version:?}"),
        "method": asked.method.as_str(),
        "path": path,
        "headers": headers,
        "body": String::from_utf8_lossy(&asked.body),
    });
    (status, axum::Json(answer)).into_response()
}
