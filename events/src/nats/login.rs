//! Who the control plane is on the cluster. Files are read each time that it connects: what was renewed meanwhile counts,
//! and a server that ends a connection because its token expired sees the new one.

use std::future::ready;
use std::path::{Path, PathBuf};

use async_nats::{Auth, AuthError, ConnectOptions};

use super::shared::NatsError;

/// Who the control plane is on the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NatsLogin {
    /// Nobody in particular.
    #[default]
    None,
    /// A `.creds` file: a JWT and its key.
    Credentials(PathBuf),
    /// A file that holds a token.
    Token(PathBuf),
    /// A file that holds `user:password`.
    User(PathBuf),
}

impl NatsLogin {
    /// Options that log in. What is wrong with the file now is said now, by the name of its field.
    pub(super) fn connect_options(&self) -> Result<ConnectOptions, NatsError> {
        if *self == Self::None {
            return Ok(ConnectOptions::new());
        }
        self.auth(&[]).map_err(NatsError::Settings)?;
        let login = self.clone();
        Ok(ConnectOptions::with_auth_callback(move |nonce| {
            ready(login.auth(&nonce).map_err(AuthError::new))
        }))
    }

    /// What to say to a server that sent this nonce.
    fn auth(&self, nonce: &[u8]) -> Result<Auth, String> {
        let mut auth = Auth::new();
        match self {
            Self::None => {}
            Self::Credentials(file) => {
                let wrong = |what: &str| format!("credentialsFile: {}: {what}", file.display());
                let text = read("credentialsFile", file)?;
                let jwt = section(&text, "USER JWT").ok_or_else(|| wrong("holds no USER JWT"))?;
                let seed =
                    section(&text, "NKEY SEED").ok_or_else(|| wrong("holds no NKEY SEED"))?;
                let signed = nkeys::KeyPair::from_seed(seed).and_then(|key| key.sign(nonce));
                auth.signature = Some(signed.map_err(|error| wrong(&error.to_string()))?);
                auth.jwt = Some(jwt.to_owned());
            }
            Self::Token(file) => auth.token = Some(read("tokenFile", file)?.trim().to_owned()),
            Self::User(file) => {
                let text = read("userFile", file)?;
                let Some((user, password)) = text.trim().split_once(':') else {
                    return Err(format!(
                        "userFile: {} does not hold user:password",
                        file.display()
                    ));
                };
                auth.username = Some(user.to_owned());
                auth.password = Some(password.to_owned());
            }
        }
        Ok(auth)
    }
}

fn read(field: &str, file: &Path) -> Result<String, String> {
    std::fs::read_to_string(file).map_err(|error| format!("{field}: {}: {error}", file.display()))
}

/// The line below `-----BEGIN … NAME-----`.
fn section<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.find(|line| line.contains("BEGIN") && line.contains(name))?;
    lines.next().filter(|line| !line.starts_with("---"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, text).unwrap();
        file
    }

    #[test]
    fn a_file_counts_as_it_is_when_connecting() {
        let file = file("ann:secret\n");
        let login = NatsLogin::User(file.path().to_owned());
        let said = || {
            let auth = login.auth(&[]).unwrap();
            (auth.username.unwrap(), auth.password.unwrap())
        };
        assert_eq!(said(), ("ann".to_owned(), "secret".to_owned()));
        std::fs::write(&file, "ann:ne:w").unwrap();
        assert_eq!(said(), ("ann".to_owned(), "ne:w".to_owned()));
    }

    #[test]
    fn credentials_sign_the_nonce() {
        let key = nkeys::KeyPair::new_user();
        let seed = key.seed().unwrap();
        let text = format!(
            "-----BEGIN NATS USER JWT-----\r\na.b.c\r\n------END NATS USER JWT------\r\n\r\n*** IMPORTANT ***\r\n\
             -----BEGIN USER NKEY SEED-----\r\n{seed}\r\n------END USER NKEY SEED------\r\n"
        );
        let file = file(&text);
        let auth = NatsLogin::Credentials(file.path().to_owned()).auth(b"nonce").unwrap();
        assert_eq!(auth.jwt.unwrap(), "a.b.c");
        key.verify(b"nonce", &auth.signature.unwrap()).unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        let path = |text: &str| file(text).into_temp_path().keep().unwrap();
        for (login, part) in [
            (NatsLogin::Token("/no/such".into()), "tokenFile: /no/such"),
            (NatsLogin::User(path("ann")), "does not hold user:password"),
            (NatsLogin::Credentials(path("")), "holds no USER JWT"),
            (NatsLogin::Credentials(path("-----BEGIN NATS USER JWT-----\nx\n")), "no NKEY SEED"),
            (
                NatsLogin::Credentials(path("-BEGIN USER JWT-\nx\n-BEGIN NKEY SEED-\nS")),
                "credentialsFile",
            ),
        ] {
            let NatsError::Settings(error) = login.connect_options().unwrap_err() else { panic!() };
            assert!(error.contains(part), "{error}");
            if let NatsLogin::User(file) | NatsLogin::Credentials(file) = login {
                std::fs::remove_file(file).unwrap();
            }
        }
    }
}
