//! Compiles the protobuf contract with `protox`, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["duet/v1/discovery.proto", "duet/v1/workload.proto", "duet/v1/bus.proto"];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().bytes(".duet.v1.Event.data").compile_fds(descriptors)?;
    Ok(())
}
