//! One row of the table.

use std::sync::Arc;

use futures::future::BoxFuture;

use super::world::World;

/// What a case does.
pub(crate) type Run = Arc<dyn Fn(Arc<World>, Names) -> BoxFuture<'static, ()> + Send + Sync>;

/// One row.
pub(crate) struct Case {
    /// Group and name, unique.
    pub(crate) name: String,
    /// YAML of its subscription below `spec`, without topic and subscriber; `None` for no subscription.
    pub(crate) subscription: Option<String>,
    /// More resources, as YAML documents. `TOPIC`, `PATH` and `NAME` are replaced.
    pub(crate) more: String,
    pub(crate) run: Run,
}

/// What belongs to a case alone.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// Its topic.
    pub(crate) topic: String,
    /// Where its events are delivered.
    pub(crate) path: String,
    /// Its subscription, in namespace `default`.
    pub(crate) subscription: String,
}

impl Case {
    /// A case whose subscription has the defaults and a short backoff.
    pub(crate) fn new<F>(
        group: &str,
        name: &str,
        run: impl Fn(Arc<World>, Names) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self {
            name: format!("{group}: {name}"),
            subscription: Some(String::new()),
            more: String::new(),
            run: Arc::new(move |world, names| Box::pin(run(world, names))),
        }
    }

    /// With more fields of the subscription, as YAML in flow style: `delivery: {ordered: true}`.
    pub(crate) fn with(mut self, fields: &str) -> Self {
        self.subscription = Some(fields.to_owned());
        self
    }

    /// Without a subscription of its own.
    pub(crate) fn alone(mut self) -> Self {
        self.subscription = None;
        self
    }

    /// With more resources.
    pub(crate) fn resources(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.more);
        self
    }

    pub(crate) fn names(&self) -> Names {
        let slug: String =
            self.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let slug = slug.to_ascii_lowercase().replace("--", "-");
        Names { topic: format!("t.{slug}"), path: format!("/{slug}"), subscription: slug }
    }

    /// Its resources.
    pub(crate) fn yaml(&self) -> String {
        let names = self.names();
        let mut yaml = String::new();
        if let Some(fields) = &self.subscription {
            let subscriber = if fields.contains("subscriber:") {
                String::new()
            } else {
                "  subscriber: {service: reader, path: PATH}\n".to_owned()
            };
            let retry = if fields.contains("retry:") {
                String::new()
            } else {
                "  retry: {maxAttempts: 3, backoff: 20ms, maxBackoff: 100ms}\n".to_owned()
            };
            let fields: String = fields.lines().map(|line| format!("  {line}\n")).collect();
            yaml = format!(
                "apiVersion: duet.dev/v1alpha1\nkind: Subscription\nmetadata: {{name: NAME}}\nspec:\n  topic: TOPIC\n{subscriber}{retry}{fields}"
            );
        }
        if !self.more.is_empty() {
            yaml = format!("{yaml}---\n{}", self.more);
        }
        yaml.replace("TOPIC", &names.topic)
            .replace("PATH", &names.path)
            .replace("NAME", &names.subscription)
    }
}
