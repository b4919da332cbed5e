//! What the environment says, checked once at start. Imports nothing of the shop.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, bail};

/// Everything an app may want to know from outside; each app reads the part that it needs.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Where to listen; 0 takes any free port.
    pub(crate) port: u16,
    /// Address the storefront listens on. Every other app is reached through its sidecar only.
    pub(crate) host: String,
    /// Folder that the replicas of one service share.
    pub(crate) data: PathBuf,
    /// Port of the sidecar's publish API on the loopback.
    pub(crate) sidecar_port: u16,
    /// Orders a second that the shopper places.
    pub(crate) rate: f64,
    /// Share of charges that fail on purpose, 0 to 100.
    pub(crate) fail_percent: f64,
    /// Share of charges that are slow on purpose, 0 to 100.
    pub(crate) slow_percent: f64,
    /// Base addresses of the services, without a slash at the end.
    pub(crate) urls: Urls,
}

/// Where each service is. The defaults are names in the mesh; without a mesh they can be real addresses.
#[derive(Debug, Clone)]
pub(crate) struct Urls {
    pub(crate) storefront: String,
    pub(crate) orders: String,
    pub(crate) inventory: String,
    pub(crate) payments: String,
}

impl Settings {
    /// Reads the process's environment.
    pub(crate) fn from_env() -> anyhow::Result<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(lookup: impl Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        // An empty variable means the same as none: that is how YAML and shells clear one.
        let get = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let url = |name: &str, default: &str| -> anyhow::Result<String> {
            let url = get(name).unwrap_or_else(|| default.to_owned());
            if !url.starts_with("http://") {
                bail!("{name} is {url:?}; it must start with http://");
            }
            Ok(url.trim_end_matches('/').to_owned())
        };
        Ok(Self {
            port: number("PORT", get("PORT"), 0)?,
            host: get("HOST").unwrap_or_else(|| "127.0.0.1".to_owned()),
            data: get("SHOP_DATA").unwrap_or_else(|| "./data".to_owned()).into(),
            sidecar_port: number("DAPR_HTTP_PORT", get("DAPR_HTTP_PORT"), 3500)?,
            rate: within("RATE", get("RATE"), 2.0, 1000.0)?,
            fail_percent: within("FAIL_PERCENT", get("FAIL_PERCENT"), 20.0, 100.0)?,
            slow_percent: within("SLOW_PERCENT", get("SLOW_PERCENT"), 5.0, 100.0)?,
            urls: Urls {
                storefront: url("STOREFRONT_URL", "http://storefront")?,
                orders: url("ORDERS_URL", "http://orders")?,
                inventory: url("INVENTORY_URL", "http://inventory")?,
                payments: url("PAYMENTS_URL", "http://payments")?,
            },
        })
    }
}

fn number<T: FromStr>(name: &str, value: Option<String>, default: T) -> anyhow::Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    match value {
        None => Ok(default),
        Some(text) => text.parse().with_context(|| format!("{name} is {text:?}")),
    }
}

fn within(name: &str, value: Option<String>, default: f64, max: f64) -> anyhow::Result<f64> {
    let value = number(name, value, default)?;
    if !(0.0..=max).contains(&value) {
        bail!("{name} is {value}; it must be from 0 to {max}");
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> anyhow::Result<Settings> {
        Settings::read(|name| {
            vars.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn an_empty_environment_gives_names_in_the_mesh() {
        let settings = read(&[("PORT", "")]).unwrap();
        assert_eq!((settings.port, settings.sidecar_port), (0, 3500));
        assert_eq!(settings.urls.payments, "http://payments");
    }

    #[test]
    fn a_slash_at_the_end_of_an_address_is_dropped() {
        let settings = read(&[("ORDERS_URL", "http://127.0.0.1:9/")]).unwrap();
        assert_eq!(settings.urls.orders, "http://127.0.0.1:9");
    }

    #[test]
    fn a_wrong_value_is_named() {
        for (name, value) in [
            ("PORT", "70000"),
            ("FAIL_PERCENT", "101"),
            ("RATE", "NaN"),
            ("RATE", "-1"),
            ("SLOW_PERCENT", "often"),
            ("ORDERS_URL", "orders"),
        ] {
            let error = format!("{:#}", read(&[(name, value)]).unwrap_err());
            assert!(error.contains(name), "{error}");
        }
    }
}
