//! Whose fault an error is.

/// Whose fault an error is. Every error type of the workspace answers with one of these; the
/// command line turns it into an exit status and a hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The caller asked for something that makes no sense or is not allowed.
    Caller,
    /// The bytes of an image or a stream are not well formed.
    Bytes,
    /// The peer sent something well formed that is not allowed now.
    PeerBehaviour,
    /// The peer, or the image, needs a feature that is not supported here.
    PeerFeatures,
    /// A local file or device failed, is missing, full or in use.
    Device,
    /// The connection failed.
    Transport,
    /// Going on would lose something the user asked to keep.
    WouldLose,
    /// What was read back is not what was written.
    Mismatch,
}
