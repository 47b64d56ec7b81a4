//! The one error of every decoder: where, which field, what is wrong with it.

/// Bytes that are not what the format says they must be.
///
/// `offset` counts from the start of whatever was handed to the decoder's [`Reader`](crate::Reader)
/// plus that reader's base, so that a caller who reads a table from the middle of a file gets file
/// offsets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} at offset {offset} {problem}")]
pub struct Malformed {
    /// Byte offset of the field.
    pub offset: u64,
    /// The field's name as the format's own text calls it.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The input ends inside the field.
    #[error("needs {needed} bytes where {left} are left")]
    Truncated {
        /// Bytes the field takes.
        needed: u64,
        /// Bytes that were left.
        left: u64,
    },
    /// A number outside its range.
    #[error("is {value}, outside {min} to {max}")]
    OutOfRange {
        /// The value found.
        value: u64,
        /// Smallest allowed value.
        min: u64,
        /// Largest allowed value.
        max: u64,
    },
    /// A number that is no power of two in its range.
    #[error("is {value}, not a power of two from {min} to {max}")]
    NotPowerOfTwo {
        /// The value found.
        value: u64,
        /// Smallest allowed value.
        min: u64,
        /// Largest allowed value.
        max: u64,
    },
    /// A value that must equal another.
    #[error("is {value:#x} where {expected:#x} is required")]
    Mismatch {
        /// The value found.
        value: u64,
        /// The value required.
        expected: u64,
    },
    /// A number that stands for nothing known here.
    #[error("is {value:#x}, which is not known here")]
    Unknown {
        /// The number found.
        value: u64,
    },
    /// A field that reaches beyond the `len` bytes of what holds it.
    #[error("reaches beyond the {len} bytes that hold it")]
    PastEnd {
        /// Bytes of what holds it.
        len: u64,
    },
    /// Reserved bits or bytes that are not zero.
    #[error("has reserved bits set: {value:#x}")]
    Reserved {
        /// The bits found.
        value: u64,
    },
    /// An offset that is not a multiple of its unit.
    #[error("is {value:#x}, not a multiple of {align:#x}")]
    Misaligned {
        /// The value found.
        value: u64,
        /// The unit.
        align: u64,
    },
    /// Something that must be unique occurs twice.
    #[error("occurs twice")]
    Duplicate,
    /// A name that is not UTF-8, or holds a NUL byte.
    #[error("is not a valid name")]
    BadName,
    /// Anything else, in words that continue the field's name.
    #[error("{0}")]
    Other(&'static str),
}

impl Malformed {
    /// Shorthand constructor.
    pub fn new(offset: u64, field: &'static str, problem: Problem) -> Self {
        Self { offset, field, problem }
    }

    /// The same error where the input was the whole of something `len` bytes long: what is missing
    /// will not come.
    #[must_use]
    pub fn inside(mut self, len: u64) -> Self {
        if let Problem::Truncated { .. } = self.problem {
            self.problem = Problem::PastEnd { len };
        }
        self
    }
}
