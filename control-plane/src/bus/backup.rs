//! Copies of buses, for an operator (`duet events backup`). Imports [`super::Buses`].

use std::fs::{self, File};
use std::path::Path;

use duet_events::bus::{Backup, ManageError};
use uuid::Uuid;

use super::Buses;

/// Start of the names of folders that hold a copy while it is made. No bus is called so.
const PREFIX: &str = ".backup-";

/// A copy of a bus.
#[derive(Debug)]
pub struct Copied {
    /// It has no name any more, so that it goes with whoever reads it.
    pub file: File,
    /// Events that are not in it, since they cannot be read any more where the bus is.
    pub missing_events: u64,
}

impl Buses {
    /// A copy of everything that a bus has stored now, while it goes on.
    ///
    /// # Errors
    /// When there is no such bus, when it is not kept here, or when the copy cannot be made.
    pub async fn backup(&self, name: &str) -> Result<Copied, ManageError> {
        let bus = self.get(name).await.map_err(|error| ManageError::Failed(error.to_string()))?;
        let dir = self.dir.join(format!("{PREFIX}{}", Uuid::new_v4()));
        // A task: when whoever asked leaves, the copy still goes.
        let copy = tokio::spawn(async move {
            let copied = bus.backup(&dir).await;
            let open = copied.and_then(|Backup { file, missing_events }| {
                let open = File::open(&file);
                let open = open
                    .map_err(|error| ManageError::Failed(format!("{}: {error}", file.display())));
                Ok(Copied { file: open?, missing_events })
            });
            remove(&dir);
            open
        });
        copy.await.unwrap_or_else(|error| Err(ManageError::Failed(error.to_string())))
    }
}

/// Removes copies that a crash left half made.
pub(super) fn clean(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            remove(&entry.path());
        }
    }
}

fn remove(dir: &Path) {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(dir = %dir.display(), %error, "a copy of a bus cannot be removed");
        }
        _ => {}
    }
}
