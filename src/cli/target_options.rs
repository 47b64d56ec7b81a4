//! `-o K=V,…` as in qemu-img: a doubled comma stands for one in a value.

use bitferry::copy::TargetOptions;
use bitferry::options::split;
use bitferry::{Error, Result};
use mig_core::block::Compression;

use super::size;

/// Reads all `-o` options; a later one wins.
pub(crate) fn parse(texts: &[String]) -> Result<TargetOptions> {
    let mut options = TargetOptions::default();
    for text in texts {
        for pair in split(text) {
            set(&mut options, &pair)?;
        }
    }
    Ok(options)
}

fn set(options: &mut TargetOptions, pair: &str) -> Result<()> {
    let (key, value) =
        pair.split_once('=').ok_or_else(|| usage(format!("-o {pair}: a value is missing")))?;
    match key {
        "cluster_size" => options.cluster_size = Some(size::parse(value).map_err(usage)?),
        "refcount_bits" => options.refcount_bits = Some(number(key, value)?),
        "extended_l2" => options.extended_l2 = Some(switch(key, value)?),
        "data_file_raw" => options.data_file_raw = Some(switch(key, value)?),
        "data_file" => options.data_file = Some(value.to_owned()),
        "compat" => options.version = Some(one_of(key, value, &[("0.10", 2), ("1.1", 3)])?),
        "compression_type" => {
            let types = [("zlib", Compression::Deflate), ("zstd", Compression::Zstd)];
            options.compression_type = Some(one_of(key, value, &types)?);
        }
        _ => {
            return Err(usage(format!(
                "-o {key}: not an option here; there are cluster_size, extended_l2, \
                 compression_type, refcount_bits, compat, data_file and data_file_raw"
            )));
        }
    }
    Ok(())
}

fn switch(key: &str, value: &str) -> Result<bool> {
    one_of(key, value, &[("on", true), ("off", false)])
}

fn number(key: &str, value: &str) -> Result<u32> {
    value.parse().map_err(|_| usage(format!("-o {key}={value}: not a number")))
}

fn one_of<T: Copy>(key: &str, value: &str, choices: &[(&str, T)]) -> Result<T> {
    choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        usage(format!("-o {key}={value}: must be {}", names.join(" or ")))
    })
}

fn usage(reason: String) -> Error {
    Error::Usage { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_one(text: &str) -> Result<TargetOptions> {
        parse(&[text.to_owned()])
    }

    #[test]
    fn qemu_img_words_are_understood() {
        let options =
            parse_one("cluster_size=2M,extended_l2=on,data_file=a,,b,data_file_raw=off").unwrap();
        assert_eq!(options.cluster_size, Some(2 << 20));
        assert_eq!(options.extended_l2, Some(true));
        assert_eq!(options.data_file.as_deref(), Some("a,b"));
        assert_eq!(options.data_file_raw, Some(false));
        assert_eq!(parse_one("compat=0.10").unwrap().version, Some(2));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in ["cluster_size", "cluster_size=big", "extended_l2=yes", "compat=2", "colour=1"]
        {
            assert_eq!(parse_one(text).unwrap_err().exit_status(), 2, "{text}");
        }
    }
}
