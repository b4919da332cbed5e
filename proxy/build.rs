//! How the binaries are linked. Also the build script of `cli`.

use std::path::Path;
use std::process::Command;

/// The first version of glibc that reads packed relocations.
const PACKED_SINCE: (u32, u32) = (2, 36);

fn main() {
    println!("cargo:rerun-if-env-changed=TARGET");
    let of = |name: &str| std::env::var(name).unwrap_or_default();
    let native = of("HOST") == of("TARGET") && of("CARGO_CFG_TARGET_ENV") == "gnu";
    if native && glibc().is_some_and(|version| version >= PACKED_SINCE) {
        // The list of pointers to set at the start is read in whole: packed, an idle sidecar takes half a MiB less.
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    // A linker that somebody chose may not read scripts.
    let chosen = of("CARGO_ENCODED_RUSTFLAGS");
    let ours =
        !chosen.contains("link-arg") && !chosen.contains("linker") && of("RUSTC_LINKER").is_empty();
    if of("CARGO_CFG_TARGET_OS") == "linux" && of("PROFILE") == "release" && ours {
        let folder = of("CARGO_MANIFEST_DIR");
        let script = Path::new(&folder).join("../proxy/layout.ld");
        println!("cargo:rerun-if-changed={}", script.display());
        println!("cargo:rustc-link-arg-bins=-T{}", script.display());
    }
}

/// This machine's.
fn glibc() -> Option<(u32, u32)> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    let minor = minor.split('.').next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
