//! Folders that nobody but their owner looks into.

use std::fs::{self, DirBuilder, Permissions};
use std::io::Result;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

/// Of everybody but the owner.
const OTHERS: u32 = 0o077;

/// Makes a folder where there is none. From one that is there, others lose what they may do in it: an older version may
/// have made it.
pub(crate) fn folder(dir: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let mode = fs::metadata(dir)?.permissions().mode();
    if mode & OTHERS != 0
        && let Err(error) = fs::set_permissions(dir, Permissions::from_mode(mode & !OTHERS))
    {
        // Somebody else's folder, most likely: they say who may do what there.
        tracing::warn!(dir = %dir.display(), %error, "events can be read by others");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn mode(dir: &Path) -> u32 {
        fs::metadata(dir).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_it_makes_and_what_an_older_version_made_is_the_owners_only() {
        let base = TempDir::new().unwrap();
        fs::set_permissions(base.path(), Permissions::from_mode(0o755)).unwrap();
        folder(&base.path().join("bus/default")).unwrap();
        for made in ["bus", "bus/default"] {
            assert_eq!(mode(&base.path().join(made)), 0o700, "{made}");
        }
        let old = base.path().join("old");
        fs::create_dir(&old).unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o2775)).unwrap();
        folder(&old).unwrap();
        assert_eq!(mode(&old), 0o700);
        assert_eq!(mode(base.path()), 0o755, "that is whoever made it to say");
    }
}
