//! A real `nats-server` on a free port of this machine, killed when dropped.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

pub(crate) struct Server {
    program: PathBuf,
    dir: TempDir,
    port: u16,
    child: Child,
}

impl Server {
    /// A server with these settings besides the port and JetStream; `None`, loudly, without the program.
    pub(crate) async fn start(settings: &str) -> Option<Self> {
        let program = find()?;
        let server = Self::start_on(program, free_port(), settings);
        server.answers().await;
        Some(server)
    }

    /// Three servers that are one cluster, named `n0` to `n2`.
    pub(crate) async fn cluster() -> Option<Vec<Self>> {
        let program = find()?;
        let ports = [free_port(), free_port(), free_port()];
        let routes = ports.map(|port| format!("\"nats://127.0.0.1:{port}\"")).join(", ");
        let start = |(number, port): (usize, u16)| {
            let settings = format!(
                "server_name: n{number}\ncluster {{ name: c, listen: \"127.0.0.1:{port}\", routes: [{routes}] }}"
            );
            Self::start_on(program.clone(), free_port(), &settings)
        };
        let servers: Vec<Self> = ports.into_iter().enumerate().map(start).collect();
        for server in &servers {
            server.answers().await;
        }
        Some(servers)
    }

    fn start_on(program: PathBuf, port: u16, settings: &str) -> Self {
        let dir = TempDir::new().unwrap();
        configure(&dir, port, settings);
        let child = run(&program, &dir);
        Self { program, dir, port, child }
    }

    /// Settings from the next start on.
    pub(crate) fn configure(&self, settings: &str) {
        configure(&self.dir, self.port, settings);
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// As if the machine lost power.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// As if its disk was replaced.
    pub(crate) fn wipe(&self) {
        std::fs::remove_dir_all(self.dir.path().join("store")).unwrap();
    }

    /// As if the machine vanished: connections stay, and nothing comes.
    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
    }

    /// It is back, with all that it had in memory.
    pub(crate) fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    pub(crate) async fn restart(&mut self) {
        self.child = run(&self.program, &self.dir);
        self.answers().await;
    }

    async fn answers(&self) {
        super::behaviour::eventually("the server answers", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.is_ok()
        })
        .await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.kill().is_ok() {
            self.child.wait().ok();
        }
    }
}

fn configure(dir: &TempDir, port: u16, settings: &str) {
    let store = dir.path().join("store");
    let config = format!(
        "listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: {store:?}, sync_interval: always }}\n{settings}\n"
    );
    std::fs::write(dir.path().join("nats.conf"), config).unwrap();
}

/// Below those that the kernel gives to connections: one of these could take it before the server does.
fn free_port() -> u16 {
    loop {
        let port = u16::try_from(10_000 + uuid::Uuid::new_v4().as_u128() % 20_000).unwrap();
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn run(program: &PathBuf, dir: &TempDir) -> Child {
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    Command::new(program)
        .arg("-c")
        .arg(dir.path().join("nats.conf"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// From the test tools (`scripts/test-deps.sh`), or of the machine. With `CI=true` it must be there.
fn find() -> Option<PathBuf> {
    let tools = std::env::var_os("DUET_TEST_TOOLS").map(PathBuf::from);
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-tools/venv/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = tools.into_iter().chain([default]).chain(std::env::split_paths(&path));
    let found = folders.map(|folder| folder.join("nats-server")).find(|file| file.is_file());
    if found.is_none() {
        assert!(
            std::env::var("CI").is_ok_and(|ci| ci == "true").eq(&false),
            "nats-server is missing"
        );
        eprintln!("SKIPPED: nats-server is missing; run scripts/test-deps.sh");
    }
    found
}
