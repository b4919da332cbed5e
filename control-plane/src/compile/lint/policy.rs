//! Parts of a traffic policy that do not fit together.

use duet_api::resource::{Field, HashOn, LoadBalancerType, TrafficPolicySpec};

use super::Lint;

impl Lint<'_> {
    pub(super) fn traffic_policy(&mut self, spec: &TrafficPolicySpec) {
        if let Some(balancer) = &spec.load_balancer {
            let hashes = balancer.kind == LoadBalancerType::Maglev;
            self.at("loadBalancer", |lint| match (&balancer.hash_on, hashes) {
                (None, true) => lint.error("type Maglev needs the field hashOn".to_owned()),
                (Some(_), false) => {
                    lint.at("hashOn", |lint| lint.error("only type Maglev hashes".to_owned()));
                }
                (Some(HashOn::Header(name)), true) => {
                    lint.at("hashOn", |lint| lint.header_name(name));
                }
                (Some(HashOn::Source(false)), true) => {
                    lint.at("hashOn", |lint| lint.error("source must be true".to_owned()));
                }
                (Some(HashOn::Cookie(_) | HashOn::Source(true)), true) | (None, false) => {}
            });
        }
        if let Some(outlier) = &spec.outlier_detection
            && outlier.min_ejection > outlier.max_ejection
        {
            self.path.extend([Field::Name("outlierDetection"), Field::Name("minEjection")]);
            self.error("must not be longer than maxEjection".to_owned());
            self.path.truncate(self.path.len() - 2);
        }
        if let Some(fault) = &spec.fault {
            self.at("fault", |lint| lint.each("headers", &fault.headers, Lint::value_match));
        }
        if spec.concurrency.is_some_and(|limit| !limit.adaptive && limit.max.is_none()) {
            self.at("concurrency", |lint| {
                lint.error("needs `adaptive: true`, `max` or both".to_owned());
            });
        }
    }
}
