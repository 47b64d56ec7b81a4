//! How hashes are written.

use std::fmt;
use std::str::FromStr;

use super::{CONTENT_PREFIX, DIGEST_PREFIX, Node};

/// Text that is no hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {prefix:?} and 64 lower-case hexadecimal digits")]
pub struct NameError {
    /// The text.
    pub text: String,
    /// What it should have begun with.
    pub prefix: &'static str,
}

macro_rules! written_hash {
    ($(#[$doc:meta])* $name:ident, $prefix:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Node);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($prefix)?;
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                text.strip_prefix($prefix).and_then(hex_node).map(Self).ok_or_else(|| NameError {
                    text: text.chars().take(80).collect(),
                    prefix: $prefix,
                })
            }
        }
    };
}

written_hash!(
    /// What a guest reads from a disk, as one value. SPEC 2.
    ContentHash,
    CONTENT_PREFIX
);
written_hash!(
    /// The granularity and the bits of a bitmap, as one value. SPEC 2.
    BitmapDigest,
    DIGEST_PREFIX
);

fn hex_node(text: &str) -> Option<Node> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != 32 || !rest.is_empty() {
        return None;
    }
    let mut node = Node::default();
    for (byte, [high, low]) in node.iter_mut().zip(pairs) {
        *byte = hex_digit(*high)?.wrapping_shl(4) | hex_digit(*low)?;
    }
    Some(node)
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => byte.checked_sub(b'0'),
        b'a'..=b'f' => byte.checked_sub(b'a').and_then(|d| d.checked_add(10)),
        _ => None,
    }
}
