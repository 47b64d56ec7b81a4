//! What bounds a connection. Each value with its reason.

use std::time::Duration;

/// Longest time in which a read or a write moves no byte. The longest honest silence is a peer that
/// makes an image durable on a slow disk; a peer that is dead is noticed by TCP itself.
pub const IDLE: Duration = Duration::from_secs(180);

/// Longest time to find a name's addresses, to connect to one of them and to finish its handshake.
pub const CONNECT: Duration = Duration::from_secs(30);

/// Longest time an accepted connection may take for its handshake, or for its first words.
pub const INTRODUCTION: Duration = Duration::from_secs(10);

/// Connections whose introduction is not over, at most: the oldest is closed for a new one. More
/// than the channels of one migration, and little memory when all are TLS.
pub const MAX_INTRODUCTIONS: usize = 64;

/// First words of a connection that are looked at: what is longer is an introduction, whatever it
/// says. More than a hello, and there at once where somebody is in earnest.
pub const MAX_INTRODUCTION: usize = 8 << 10;

/// Connections that the kernel holds for us.
pub const BACKLOG: u32 = 64;

/// Connections of one migration, as many as the hello can say.
pub const MAX_CONNECTIONS: u16 = 255;

/// Silence after which TCP asks whether the peer is there, and time between two questions.
pub const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));

/// How long a refused peer is listened to, so that what it still sends does not destroy the words
/// that it was refused with, and how many bytes.
pub const FAREWELL: (Duration, usize) = (Duration::from_secs(1), 256 << 10);

/// What a command at another host may print where it is asked for a document, at most.
pub const MAX_ANSWER: u64 = 8 << 20;

/// How long an orderly end of a TLS stream may take.
pub const GOODBYE: Duration = Duration::from_secs(5);

/// How long a command whose pipe broke may take to end and thereby say why.
pub const CHILD_LAST_WORD: Duration = Duration::from_secs(1);

/// Ciphertext that is read or encrypted at once: 16 records.
pub const TLS_BATCH: usize = 256 << 10;

/// Bytes of a file of certificates or a key, at most.
pub const MAX_PEM: u64 = 1 << 20;

/// Longest path of a Unix socket: the kernel's field has 108 bytes, one of them a NUL.
pub const MAX_SOCKET_PATH: usize = 107;
