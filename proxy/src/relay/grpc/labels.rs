//! What an application says about itself, over gRPC (`SetMetadata`) or HTTP (`PUT /v1.0/metadata/{key}`).

use std::collections::BTreeMap;

use http::StatusCode;
use parking_lot::Mutex;

use super::super::problem::Problem;

/// What an application may say about itself.
const MAX_LABELS: usize = 64;
/// Of one key with its value.
const MAX_LABEL_BYTES: usize = 4096;

/// The values by their keys.
#[derive(Debug, Default)]
pub(in crate::relay) struct Labels(Mutex<BTreeMap<String, String>>);

impl Labels {
    /// Sets the value of a key.
    ///
    /// # Errors
    /// 400 when one of them cannot be one, 429 when there is no room for another key.
    pub(in crate::relay) fn set(&self, key: String, value: String) -> Result<(), Problem> {
        let bad = |status, text| Err(Problem::new(status, "ERR_MALFORMED_REQUEST", text));
        if key.is_empty() || key.len() + value.len() > MAX_LABEL_BYTES {
            let text = format!("a key, and with its value at most {MAX_LABEL_BYTES} bytes");
            return bad(StatusCode::BAD_REQUEST, text);
        }
        let mut labels = self.0.lock();
        if labels.len() >= MAX_LABELS && !labels.contains_key(&key) {
            return bad(StatusCode::TOO_MANY_REQUESTS, format!("at most {MAX_LABELS} keys"));
        }
        labels.insert(key, value);
        Ok(())
    }

    /// All of them.
    pub(in crate::relay) fn all(&self) -> BTreeMap<String, String> {
        self.0.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use tonic::{Code, Status};

    use super::*;

    #[test]
    fn labels_have_bounds_and_can_be_changed() {
        let labels = Labels::default();
        let set = |key: &str, value: &str| labels.set(key.to_owned(), value.to_owned());
        assert_eq!(set("", "x").unwrap_err().status, StatusCode::BAD_REQUEST);
        assert_eq!(set("k", &"x".repeat(4096)).unwrap_err().status, StatusCode::BAD_REQUEST);
        for number in 0..64 {
            set(&number.to_string(), "").unwrap();
        }
        set("7", "again").unwrap();
        assert_eq!(labels.all()["7"], "again");
        let full = set("one more", "x").unwrap_err();
        assert_eq!(Status::from(full).code(), Code::ResourceExhausted);
        assert_eq!(labels.all().len(), 64);
    }
}
