//! Compiles the protobuf contracts with `protox`, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["duet/v1/discovery.proto", "duet/v1/workload.proto", "duet/v1/bus.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".duet.v1.Event.data")
        .btree_map(".duet.v1.Event.attributes")
        .extern_path(".duet.v1.PublishRequest", "crate::publish::PublishRequest")
        .compile_fds(descriptors)?;
    let files = [
        "dapr/proto/runtime/v1/dapr.proto",
        "dapr/proto/runtime/v1/appcallback.proto",
        "grpc/health/v1/health.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    let runtime = |name: &str| format!(".dapr.proto.runtime.v1.{name}");
    tonic_prost_build::configure()
        .bytes(runtime("PublishEventRequest.data"))
        .bytes(runtime("BulkPublishRequestEntry.event"))
        .bytes(runtime("TopicEventRequest.data"))
        .bytes(runtime("TopicEventCERequest.data"))
        .compile_fds(descriptors)?;
    Ok(())
}
