//! `info`: what an image is, for people and as the document of CLI.md.

use bitferry::info::{BitmapSummary, ImageInfo, InfoOptions};

use super::args::InfoArgs;
use super::size::{human, human_exact};
use super::{Outcome, Output, table};

pub(crate) fn run(args: InfoArgs, output: &Output) -> Outcome {
    let options = InfoOptions {
        image: args.image,
        format: args.source_format,
        allow_backing: args.allow_backing,
    };
    let info = bitferry::info::run(&options)?;
    warn_of_users(&info, output);
    output.answer(&info, || text(&info))?;
    Ok(0)
}

/// Says on stderr that the image is in use, and what that means for what is shown.
pub(crate) fn warn_of_users(info: &ImageInfo, output: &Output) {
    if !info.in_use {
        return;
    }
    let by = match info.users.as_slice() {
        [] => String::new(),
        users => format!(" by {}", users.join(", ")),
    };
    output.warn(&format!(
        "{} is in use{by}: what is shown may be changing, and bitmaps that are recorded there are \
         not stored before it is closed",
        info.filename
    ));
}

fn text(info: &ImageInfo) -> String {
    let mut fields = vec![
        ("image", info.filename.clone()),
        ("format", info.format.to_string()),
        ("virtual size", human_exact(info.virtual_size)),
        ("disk size", human_exact(info.disk_size)),
    ];
    if info.cluster_size > 0 {
        fields.push(("cluster size", human(info.cluster_size)));
    }
    let opened = if info.backing_chain.is_some() { "" } else { " (not opened)" };
    if let Some(file) = &info.backing_filename {
        fields.push(("backing file", format!("{}{opened}", table::name(file))));
    }
    for layer in info.backing_chain.iter().flatten() {
        let (name, format) = (table::name(&layer.filename), layer.format);
        let (size, on_disk) = (human(layer.virtual_size), human(layer.disk_size));
        let mut text = format!("{name}, {format}, {size}, {on_disk} on disk");
        if !layer.bitmaps.is_empty() {
            let names: Vec<_> = layer.bitmaps.iter().map(|name| table::name(name)).collect();
            text.push_str(&format!(", bitmaps {}", names.join(", ")));
        }
        fields.push(("  below", text));
    }
    if let Some(file) = &info.data_file {
        fields.push(("data file", format!("{}{opened}", table::name(file))));
    }
    fields.extend(info.notes.iter().map(|note| ("note", note.clone())));
    fields.push(("bitmaps", if info.bitmaps.is_empty() { "none" } else { "" }.to_owned()));
    let mut text = table::fields(&fields).replace(": \n", ":\n");
    text.truncate(text.trim_end().len());
    text.push('\n');
    if !info.bitmaps.is_empty() {
        text.push_str(&bitmap_table(info));
    }
    text
}

/// The bitmaps of an image, one per line.
pub(crate) fn bitmap_table(info: &ImageInfo) -> String {
    let rows: Vec<[String; 4]> = info
        .bitmaps
        .iter()
        .map(|bitmap| {
            [
                table::name(&bitmap.name),
                human(bitmap.granularity),
                state(bitmap, info.in_use).to_owned(),
                bitmap.dirty_bytes.map_or_else(|| "unknown".to_owned(), human),
            ]
        })
        .collect();
    table::columns(["NAME", "GRANULARITY", "STATE", "DIRTY"], &rows)
}

/// Whether a bitmap of an image in use was inconsistent before that nobody can tell but its user.
fn state(bitmap: &BitmapSummary, is_in_use: bool) -> &'static str {
    match (bitmap.inconsistent, bitmap.enabled) {
        (true, _) if is_in_use => "in use",
        (true, _) => "inconsistent",
        (false, true) => "enabled",
        (false, false) => "disabled",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitferry::copy::Format;

    #[test]
    fn an_image_reads_at_a_glance() {
        let info = ImageInfo {
            filename: "vm.qcow2".into(),
            format: Format::Qcow2,
            virtual_size: 64 << 30,
            disk_size: 1_288_490_188,
            cluster_size: 65536,
            backing_filename: Some("base image.qcow2".into()),
            data_file: None,
            backing_chain: None,
            in_use: false,
            users: vec![],
            notes: vec![],
            bitmaps: vec![BitmapSummary {
                name: "daily".into(),
                granularity: 65536,
                enabled: true,
                persistent: true,
                inconsistent: false,
                dirty_bytes: Some(3 * 65536),
            }],
        };
        let expected = "\
image:        vm.qcow2
format:       qcow2
virtual size: 64 GiB (68719476736 bytes)
disk size:    1.20 GiB (1288490188 bytes)
cluster size: 64 KiB
backing file: \"base image.qcow2\" (not opened)
bitmaps:
  NAME   GRANULARITY  STATE    DIRTY
  daily  64 KiB       enabled  192 KiB
";
        assert_eq!(text(&info), expected);
        let mut info = info;
        info.bitmaps[0].inconsistent = true;
        assert!(text(&info).contains("64 KiB       inconsistent"));
        info.in_use = true;
        assert!(text(&info).contains("64 KiB       in use"));
    }
}
