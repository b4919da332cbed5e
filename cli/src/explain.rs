//! `duet explain`: how a request would be treated, without sending it. The control plane's code says which rules there
//! are and where each setting comes from, the sidecar's code which of the rules the request falls under.

mod describe;
mod notes;
mod report;
mod request;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;

use duet_api::DEFAULT_NAMESPACE;
use duet_control_plane::check;

use crate::output::{self, Format, Printing};
use crate::resources::Resources;
use report::{Caller, Report};

/// Say how a request would be treated.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  duet explain --config examples/shop --from orders http://inventory/stock/mug
  duet explain --config mesh/ --from shop/orders -X POST -H 'x-canary: 1' http://payments/charge
  duet explain --config mesh/ --from shop/web -H 'content-type: application/grpc' \\
      -X POST http://stock.warehouse:7070/stock.Stock/Get
  duet explain --config mesh/ --from shop/orders -o json http://inventory/stock      for tools

Exit code 1 where the mesh itself would answer with an error. docs/explain.md says how to read it.")]
pub(crate) struct Args {
    /// File or folder of resources, or the folder of a duet.yaml (repeatable).
    #[arg(long, required = true, value_name = "PATH", value_delimiter = ',')]
    config: Vec<PathBuf>,
    /// Who calls: `service`, or `namespace/service`.
    #[arg(long, value_name = "SERVICE")]
    from: String,
    /// Namespace of a caller that is named without one [default: of the duet.yaml, else default].
    #[arg(long)]
    namespace: Option<String>,
    /// Method of the request.
    #[arg(short = 'X', long, default_value = "GET")]
    method: String,
    /// Header of the request, as `name: value` (repeatable). `Host` is what is dialled, in place of the URL's host.
    #[arg(short = 'H', long = "header", value_name = "HEADER")]
    headers: Vec<String>,
    /// What is called, such as `http://inventory/stock?x=1`.
    url: String,
    #[command(flatten)]
    printing: Printing,
}

/// Exit code 1 when the mesh would answer with an error of its own.
pub(crate) fn explain(args: &Args) -> anyhow::Result<ExitCode> {
    let head = request::head(&args.method, &args.url, &args.headers)?;
    let resources = Resources::find(&args.config)?;
    let (index, errors) = check::load(&resources.paths, &resources.expected);
    for error in errors {
        output::note(&format!("not taken into account: {error}"));
    }
    let namespace = args.namespace.clone().or(resources.namespace);
    let namespace = namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
    let report = Report::new(&index, &Caller::parse(&args.from, &namespace)?, head)?;
    let text = match args.printing.format() {
        Format::Text => text::render(&report),
        Format::Json => serde_json::to_string_pretty(&report)?,
    };
    output::read_or_not(output::answer(text.trim_end()))?;
    Ok(if report.outcome.is_error() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
