//! More time for an application that works on an event: each piece of work has a deadline that the application can move
//! by its token. Imports nothing of the relay but problems.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Response, StatusCode};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::problem::Problem;
use crate::http::body::Body;

/// Nothing is worked on for longer, however often more time is asked for.
const LONGEST: Duration = Duration::from_secs(3600);

/// The work in hand, by its token. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub(super) struct Extensions(Arc<Mutex<HashMap<String, Deadline>>>);

#[derive(Clone, Copy, Debug)]
struct Deadline {
    due: Instant,
    /// The answer's bound as the subscription has it: what one extension gives.
    step: Duration,
    last: Instant,
}

/// The deadline of one piece of work, as long as it lives.
#[derive(Debug)]
pub(super) struct Bound {
    all: Extensions,
    token: String,
}

impl Extensions {
    /// Starts the time of a piece of work.
    pub(super) fn begin(&self, token: &str, step: Duration) -> Bound {
        let now = Instant::now();
        let deadline = Deadline { due: now + step, step, last: now + LONGEST.max(step) };
        self.0.lock().insert(token.to_owned(), deadline);
        Bound { all: self.clone(), token: token.to_owned() }
    }

    /// Answers `POST /v1.0/deliveries/{token}/extend`; `rest` is what follows `/v1.0/deliveries/`.
    ///
    /// # Errors
    /// 404 when nobody works on it any more, 400 when a bound of its own (`by=30s`) makes no sense.
    pub(super) fn answer(
        &self,
        rest: &str,
        method: &Method,
        query: &str,
    ) -> Result<Response<Body>, Problem> {
        let Some(token) = rest.strip_suffix("/extend").filter(|_| method == Method::POST) else {
            let text = "the call is POST /v1.0/deliveries/{token}/extend";
            return Err(Problem::new(StatusCode::NOT_FOUND, "ERR_NOT_FOUND", text));
        };
        let by = query.split('&').find_map(|pair| pair.strip_prefix("by="));
        let by = by.map(duet_api::duration::parse).transpose().map_err(|error| {
            let text = error.to_string();
            Problem::new(StatusCode::BAD_REQUEST, "ERR_MALFORMED_REQUEST", text)
        })?;
        if !self.extend(token, by) {
            let text = "nobody works on this delivery: it was answered, or its time is over";
            return Err(Problem::new(StatusCode::NOT_FOUND, "ERR_DELIVERY_NOT_FOUND", text));
        }
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::NO_CONTENT;
        Ok(response)
    }

    /// For work that is done piece by piece: the next piece has all of the time.
    pub(super) fn renew(&self, token: &str) {
        // Work that ended has no next piece.
        self.extend(token, None);
    }

    /// From now on; never shortens. False: there is no such work.
    fn extend(&self, token: &str, by: Option<Duration>) -> bool {
        let mut all = self.0.lock();
        let Some(deadline) = all.get_mut(token) else {
            return false;
        };
        let by = by.unwrap_or(deadline.step).min(LONGEST);
        deadline.due = (Instant::now() + by).min(deadline.last).max(deadline.due);
        true
    }
}

impl Bound {
    /// Returns when the time is over, extensions included.
    pub(super) async fn over(&self) {
        while let Some(due) = self.due()
            && due > Instant::now()
        {
            tokio::time::sleep_until(due).await;
        }
    }

    fn due(&self) -> Option<Instant> {
        self.all.0.lock().get(&self.token).map(|deadline| deadline.due)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.all.0.lock().remove(&self.token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_is_extended_within_bounds_and_never_shortened() {
        let all = Extensions::default();
        let started = Instant::now();
        let bound = all.begin("a", Duration::from_secs(10));
        assert!(all.extend("a", Some(Duration::from_secs(1))));
        assert!(all.extend("a", Some(Duration::from_secs(60))));
        assert!(!all.extend("b", None));
        bound.over().await;
        assert_eq!(started.elapsed().as_secs(), 60);
        for _ in 0..10 {
            all.extend("a", Some(LONGEST * 2));
        }
        bound.over().await;
        assert_eq!(started.elapsed().as_secs(), LONGEST.as_secs());
        drop(bound);
        assert!(all.answer("a/extend", &Method::POST, "").is_err());
    }
}
