//! Resources as `duet check` and `duet explain` are given them: files, folders, and the folders (or files) of a
//! `duet.yaml`, which stand for the resources and the services of that mesh.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use duet_api::spiffe::SpiffeId;
use duet_control_plane::index::{Replica, ReplicaPort};

use crate::up::config::{Mesh, Port};

const MESH_FILE: &str = "duet.yaml";
/// The port that a service without a resource has in any case.
const DEFAULT_PORT: u16 = 80;

/// What was given.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    /// Files and folders of resources.
    pub(crate) paths: Vec<PathBuf>,
    /// Replicas that will register when the meshes run: they make services known that no resource declares.
    pub(crate) expected: Vec<Replica>,
    /// Of the first mesh's services.
    pub(crate) namespace: Option<String>,
}

impl Resources {
    /// Looks for meshes among paths.
    pub(crate) fn find(given: &[PathBuf]) -> anyhow::Result<Self> {
        let mut resources = Self::default();
        for path in given {
            match mesh_file(path) {
                Some(file) => resources.add_mesh(&file)?,
                None => resources.paths.push(path.clone()),
            }
        }
        Ok(resources)
    }

    fn add_mesh(&mut self, file: &Path) -> anyhow::Result<()> {
        let mesh = Mesh::load(file)?;
        let folder = file.parent().unwrap_or(Path::new(""));
        self.paths.extend(mesh.resources.iter().map(|path| folder.join(path)));
        self.expected.extend(expected(&mesh)?);
        self.namespace.get_or_insert(mesh.namespace);
        Ok(())
    }
}

fn mesh_file(path: &Path) -> Option<PathBuf> {
    if path.is_dir() {
        Some(path.join(MESH_FILE)).filter(|file| file.is_file())
    } else {
        (path.file_name()? == MESH_FILE).then(|| path.to_owned())
    }
}

/// One replica of each app, as far as it is known before it runs: not ready, and without an address.
pub(crate) fn expected(mesh: &Mesh) -> anyhow::Result<Vec<Replica>> {
    let replica = |(name, app): (&String, &crate::up::config::App)| {
        let identity = SpiffeId::new(&mesh.trust_domain, &mesh.namespace, name)
            .with_context(|| format!("apps.{name}"))?;
        let port = match app.port {
            Port::Fixed(port) => port,
            // Whatever will be free: nobody can dial it by number.
            Port::Auto => DEFAULT_PORT,
        };
        let app_protocol = app.protocol.clone().unwrap_or_default();
        Ok(Replica {
            identity,
            namespace: mesh.namespace.clone(),
            instance: name.clone(),
            services: vec![name.clone()],
            address: ([0, 0, 0, 0], 0).into(),
            ports: vec![ReplicaPort { name: "http".to_owned(), port, app_protocol }],
            zone: String::new(),
            ready: false,
        })
    };
    mesh.apps.iter().map(replica).collect()
}
