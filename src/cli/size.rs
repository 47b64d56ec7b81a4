//! Sizes and times as people read and write them.

use std::time::Duration;

const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// `1.5 GiB`. Exact where it is whole, else rounded to three digits.
pub(crate) fn human(bytes: u64) -> String {
    let (value, unit) = scale(bytes);
    if unit == 0 || value.fract() == 0.0 {
        return format!("{value:.0} {}", UNITS[unit]);
    }
    if value >= 1023.5 && unit + 1 < UNITS.len() {
        return format!("1.00 {}", UNITS[unit + 1]);
    }
    let decimals = if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// `1.5 GiB (1610612736 bytes)`.
pub(crate) fn human_exact(bytes: u64) -> String {
    if bytes < 1024 { human(bytes) } else { format!("{} ({bytes} bytes)", human(bytes)) }
}

/// The largest unit that leaves at least one, by index.
fn scale(bytes: u64) -> (f64, usize) {
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    (value, unit)
}

/// `340 ms`, `2.1 s`, `3 min 20 s`.
pub(crate) fn human_time(time: Duration) -> String {
    let ms = time.as_millis();
    if ms < 1000 {
        format!("{ms} ms")
    } else if ms < 60_000 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        let s = time.as_secs();
        if s < 3600 {
            format!("{} min {} s", s / 60, s % 60)
        } else {
            format!("{} h {} min", s / 3600, s % 3600 / 60)
        }
    }
}

/// `64K`, `1.5G` is refused: a number and perhaps K, M, G or T, powers of 1024.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        Some(b't' | b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is not a size: a whole number and perhaps K, M, G or T"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_right() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (512, "512 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (65536, "64 KiB"),
            (1536, "1.50 KiB"),
            (12_345_678, "11.8 MiB"),
            (234_567_890, "224 MiB"),
            (1 << 40, "1 TiB"),
            ((1 << 30) - 65536, "1.00 GiB"),
            ((1 << 30) - (1 << 20), "1023 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("64K"), Ok(65536));
        assert_eq!(parse("2t"), Ok(2 << 40));
        for text in ["", "K", "-1", "1.5G", "64KiB", "99999999999T", "é"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_grow_their_units() {
        let text = |ms| human_time(Duration::from_millis(ms));
        assert_eq!(text(340), "340 ms");
        assert_eq!(text(2149), "2.1 s");
        assert_eq!(text(200_000), "3 min 20 s");
        assert_eq!(text(7_260_000), "2 h 1 min");
    }
}
