//! `compare`: what a guest reads from two images, and their bitmaps.

use bitferry::compare::{CompareOptions, Comparison};

use super::args::CompareArgs;
use super::watch::Watch;
use super::{Outcome, Output, table};

pub(crate) fn run(args: CompareArgs, output: &Output) -> Outcome {
    let options = CompareOptions {
        a: args.a,
        b: args.b,
        format_a: args.source_format,
        format_b: args.other_format,
        allow_backing: args.allow_backing,
        allow_size: args.allow_size,
        bitmaps: args.bitmaps,
    };
    let watch = Watch::quiet_unless_asked(output)?;
    let comparison = bitferry::compare::run(&options, &watch)?;
    watch.finish();
    output.answer(&comparison, || text(&comparison, output))?;
    Ok(comparison.exit_status())
}

fn text(comparison: &Comparison, output: &Output) -> String {
    let verdict = |equal| if equal { output.good("equal") } else { output.bad("different") };
    let mut text = format!("content: {}", verdict(comparison.content.equal));
    if let Some(offset) = comparison.content.first_difference {
        text.push_str(&format!(", first at byte {offset}"));
    }
    text.push('\n');
    for bitmap in &comparison.bitmaps {
        text.push_str(&format!("bitmap {}: {}", table::name(&bitmap.name), verdict(bitmap.equal)));
        if let Some(reason) = &bitmap.reason {
            text.push_str(&format!(", {reason}"));
        }
        text.push('\n');
    }
    text
}
