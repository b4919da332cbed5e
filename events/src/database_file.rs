//! Files of embedded databases (`redb`).

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Result};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The database begins with so many bytes that say what it is.
const MAGIC: usize = 9;

/// Opens a database's file, or creates it. One whose creation was cut short is empty again: the database writes what it
/// is last, when the file has its length already, and refuses a file that has a length and does not say what it is.
pub(crate) fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path)?;
    // A file that somebody else has locked may be one that is being created now.
    match file.try_lock() {
        Ok(()) => {
            let emptied = if is_unfinished(&file)? { file.set_len(0) } else { Ok(()) };
            file.unlock()?;
            emptied?;
        }
        // The database says so as well, and where there are no locks it goes without.
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
    }
    Ok(file)
}

fn is_unfinished(file: &File) -> Result<bool> {
    let mut begin = [1; MAGIC];
    match file.read_exact_at(&mut begin, 0) {
        Ok(()) => Ok(begin == [0; MAGIC]),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use redb::Database;
    use redb::backends::FileBackend;
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn a_file_whose_creation_was_cut_short_is_empty_again() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("f");
        // As the database leaves it before its last write.
        let mut bytes = vec![0; 73_728];
        bytes[MAGIC..20].fill(7);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(open(&path).unwrap().metadata().unwrap().len(), 0);
        let file = FileBackend::new(open(&path).unwrap()).unwrap();
        drop(Database::builder().create_with_backend(file).unwrap());
        let length = std::fs::metadata(&path).unwrap().len();
        assert!(length > 0);
        assert_eq!(open(&path).unwrap().metadata().unwrap().len(), length);
    }

    #[test]
    fn a_file_that_somebody_has_and_one_that_is_something_else_stay_as_they_are() {
        let dir = TempDir::new().unwrap();
        let (taken, other) = (dir.path().join("taken"), dir.path().join("other"));
        std::fs::write(&taken, [0; 100]).unwrap();
        let holder = File::open(&taken).unwrap();
        holder.lock().unwrap();
        assert_eq!(open(&taken).unwrap().metadata().unwrap().len(), 100);
        std::fs::write(&other, [1; 100]).unwrap();
        assert_eq!(open(&other).unwrap().metadata().unwrap().len(), 100);
    }
}
