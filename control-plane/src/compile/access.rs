//! Which account may be a replica of which service.

use duet_api::spiffe::SpiffeId;

use crate::index::{ACCOUNTS_ANNOTATION, Index, ServiceKey};

/// Checks that a workload may be a replica of a service: it is of the same namespace, and its account is named like
/// the service or listed in the Service's annotation.
///
/// # Errors
/// Why not, for the caller to read.
pub fn may_serve(index: &Index, who: &SpiffeId, service: &ServiceKey) -> Result<(), String> {
    if who.namespace() != service.namespace {
        return Err(format!(
            "{who} is of namespace {:?} and cannot serve in {:?}",
            who.namespace(),
            service.namespace
        ));
    }
    let annotations = index.service(service).map(|service| &service.metadata.annotations);
    let listed = annotations.and_then(|annotations| annotations.get(ACCOUNTS_ANNOTATION));
    let listed = listed.into_iter().flat_map(|accounts| accounts.split(',').map(str::trim));
    let allowed = listed.chain([service.name.as_str()]).any(|account| account == who.account());
    if allowed {
        return Ok(());
    }
    Err(format!(
        "service account {:?} may not serve {service}: the account must be called {:?}, or the Service must list it \
         in the annotation {ACCOUNTS_ANNOTATION}",
        who.account(),
        service.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::testing::index;

    #[test]
    fn accounts_serve_what_is_named_like_them_or_lists_them() {
        let index = index(
            "{apiVersion: v1, kind: Service, metadata: {name: api, namespace: shop, annotations: \
             {duet.dev/service-accounts: 'web, admin'}}}",
        );
        let may = |namespace: &str, account: &str, service: &str| {
            let who = SpiffeId::new("duet.local", namespace, account).unwrap();
            may_serve(&index, &who, &ServiceKey::new("shop", service))
        };
        assert!(may("shop", "orders", "orders").is_ok());
        assert!(may("shop", "admin", "api").is_ok());
        assert!(may("shop", "api", "api").is_ok());
        assert!(may("shop", "orders", "api").unwrap_err().contains("duet.dev/service-accounts"));
        assert!(may("ops", "orders", "orders").unwrap_err().contains("namespace \"ops\""));
    }
}
