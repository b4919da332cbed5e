//! `duet check`: everything that is wrong with resource files, before they are applied.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::output::{self, Format, Printing};
use crate::resources::Resources;

/// Validate resource files.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  duet check mesh/                  every .yaml file in a folder
  duet check a.yaml b.yaml          several files together: references between them are looked up
  duet check examples/shop          the resources of a duet.yaml, together with its apps
  duet check -o json mesh/          for tools")]
pub(crate) struct Args {
    /// Files and folders, checked together; the folder of a duet.yaml stands for that mesh.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    printing: Printing,
}

/// Exit code 1 when there are errors; warnings alone are fine.
pub(crate) fn check(args: &Args) -> anyhow::Result<ExitCode> {
    let resources = Resources::find(&args.paths)?;
    let report = duet_control_plane::check::check(&resources.paths, &resources.expected);
    let findings = || {
        let errors = report.errors.iter().map(|error| ("error", error));
        errors.chain(report.warnings.iter().map(|warning| ("warning", warning)))
    };
    let text = match args.printing.format() {
        Format::Text => {
            let found = findings().map(|(severity, finding)| format!("{severity}: {finding}\n"));
            format!(
                "{}{} resources, {} errors, {} warnings",
                found.collect::<String>(),
                report.resources,
                report.errors.len(),
                report.warnings.len()
            )
        }
        Format::Json => {
            let findings: Vec<_> = findings()
                .map(|(severity, finding)| {
                    serde_json::json!({
                        "severity": severity,
                        "file": &*finding.file,
                        "line": finding.line,
                        "column": finding.column,
                        "field": finding.field,
                        "message": finding.message,
                    })
                })
                .collect();
            let report = serde_json::json!({"resources": report.resources, "findings": findings});
            format!("{report:#}")
        }
    };
    output::read_or_not(output::answer(&text))?;
    Ok(if report.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
