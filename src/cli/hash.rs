//! `hash`: the content hash and the bitmap digests.

use bitferry::hash::{HashOptions, Hashes};

use super::args::HashArgs;
use super::watch::Watch;
use super::{Outcome, Output, table};

pub(crate) fn run(args: HashArgs, output: &Output) -> Outcome {
    let options = HashOptions {
        image: args.image,
        format: args.source_format,
        allow_backing: args.allow_backing,
    };
    let watch = Watch::quiet_unless_asked(output)?;
    let hashes = bitferry::hash::run(&options, &watch)?;
    watch.finish();
    output.answer(&hashes, || text(&hashes))?;
    Ok(0)
}

/// Hash first, as `sha256sum` prints it, so that the first word of the first line is the answer.
fn text(hashes: &Hashes) -> String {
    let mut text = format!("{}  content\n", hashes.content_hash);
    for bitmap in &hashes.bitmaps {
        let digest = bitmap.digest.as_deref().unwrap_or("inconsistent, no digest");
        let name = table::name(&bitmap.name);
        let granularity = super::size::human(bitmap.granularity);
        text.push_str(&format!("{digest}  bitmap {name} ({granularity})\n"));
    }
    text
}
