//! A PostgreSQL server of the test's own, on a free port of 127.0.0.1.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;

use crate::port::free_port;
use crate::process::Process;
use crate::{SOON, eventually, tools};

/// A server; ended and removed when dropped.
#[derive(Debug)]
pub struct Postgres {
    process: Process,
    /// How clients reach it, without a password.
    pub url: String,
    /// The same over TLS, with the server's certificate verified.
    pub tls_url: String,
    _folder: TempDir,
}

impl Postgres {
    /// Starts one. `None` where there is no PostgreSQL: the test is skipped, loudly.
    pub async fn start() -> Option<Self> {
        let (initdb, postgres) = (program("initdb")?, program("postgres")?);
        let folder = tempfile::tempdir().unwrap();
        // The server refuses to be root, so the folder is its user's.
        let user = Account::find();
        if let Some(user) = &user {
            std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))
                .unwrap();
            user.owns(folder.path());
        }
        let data = folder.path().join("data");
        let mut command = Account::command(user.as_ref(), &initdb);
        command.args([
            "--auth=trust",
            "--username=app",
            "--encoding=UTF8",
            "--no-sync",
            "--pgdata",
        ]);
        let output = command.arg(&data).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let root = certificate(folder.path(), user.as_ref());
        let port = free_port();
        let mut command = Account::command(user.as_ref(), &postgres);
        command.current_dir(folder.path()).arg("-D").arg(&data).args(["-p", &port.to_string()]);
        for setting in [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=off",
            "ssl=on",
            "ssl_cert_file=../server.pem",
            "ssl_key_file=../server.key",
        ] {
            command.args(["-c", setting]);
        }
        let process = Process::start("postgres", command, folder.path());
        let url = format!("postgres://app@127.0.0.1:{port}/postgres");
        eventually("PostgreSQL answers", SOON, || async {
            let connection = PgConnection::connect(&url).await.ok()?;
            connection.close().await.ok()
        })
        .await;
        let tls_url = format!("{url}?sslmode=verify-full&sslrootcert={}", root.display());
        Some(Self { process, url, tls_url, _folder: folder })
    }

    /// A connection.
    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // A fast shutdown, which ends its children and its clients too.
        self.process.signal(rustix::process::Signal::INT);
        self.process.wait();
    }
}

/// A certificate for 127.0.0.1 and its key; returns where the certificate is, which is its own authority.
fn certificate(folder: &Path, user: Option<&Account>) -> PathBuf {
    let signed = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let files =
        [("server.pem", signed.cert.pem()), ("server.key", signed.signing_key.serialize_pem())];
    for (name, text) in files {
        let file = folder.join(name);
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        if let Some(user) = user {
            user.owns(&file);
        }
    }
    folder.join("server.pem")
}

/// Of the newest version that Debian has installed, or of the path.
fn program(name: &str) -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin").join(name));
    found.filter(|program| program.is_file()).max().or_else(|| tools::find(name))
}

/// Somebody to be instead of root.
struct Account {
    uid: u32,
    gid: u32,
}

impl Account {
    /// `None`: we are nobody special ourselves.
    fn find() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let users = std::fs::read_to_string("/etc/passwd").unwrap();
        let of = |name: &str| {
            let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
            let mut ids = line.split(':').skip(2).map(|id| id.parse().unwrap());
            Some(Self { uid: ids.next()?, gid: ids.next()? })
        };
        of("postgres").or_else(|| of("nobody"))
    }

    fn owns(&self, folder: &Path) {
        chown(folder, Some(self.uid), Some(self.gid)).unwrap();
    }

    fn command(user: Option<&Self>, program: &Path) -> Command {
        let mut command = Command::new(program);
        if let Some(user) = user {
            std::os::unix::process::CommandExt::uid(&mut command, user.uid);
            std::os::unix::process::CommandExt::gid(&mut command, user.gid);
        }
        command
    }
}
