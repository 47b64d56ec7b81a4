//! What TLS failures mean for who typed the command.

use std::io;

use rustls::{AlertDescription, CertificateError};

/// Why there is no TLS with a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The peer's bytes are no TLS.
    #[error("what it sends is not TLS")]
    NotTls,
    /// The peer ended the connection during the handshake.
    #[error("it hung up during the handshake")]
    HungUp,
    /// The handshake took too long.
    #[error("its handshake took longer than {seconds} s")]
    Slow {
        /// The limit.
        seconds: u64,
    },
    /// The peer's certificate is for someone else.
    #[error("its certificate is not for {expected:?}")]
    WrongName {
        /// Who it should have been.
        expected: String,
    },
    /// The peer's certificate is not of our authority.
    #[error("its certificate is not signed by the authority in ca-cert.pem")]
    Foreign,
    /// The peer's certificate is not valid any more, or not yet.
    #[error("its certificate is {0}")]
    OutOfTime(&'static str),
    /// The peer's certificate was taken back.
    #[error("its certificate was revoked")]
    Revoked,
    /// The peer's certificate is otherwise bad.
    #[error("its certificate is refused: {0}")]
    BadCertificate(String),
    /// A client showed no certificate.
    #[error("it shows no certificate")]
    NoCertificate,
    /// The peer refuses this side's certificate, and says why.
    #[error("it refuses this side's certificate: {0}")]
    Refused(String),
    /// The peer ends the handshake otherwise.
    #[error("it says: {0}")]
    Alert(String),
    /// Both sides speak TLS and have nothing in common.
    #[error("it cannot do what is demanded here, which is TLS 1.3: {0}")]
    Incompatible(String),
    /// A message that breaks the protocol, or was changed on its way.
    #[error("its messages are damaged: {0}")]
    Damaged(String),
    /// The system's answer.
    #[error("{0}")]
    System(String),
}

impl TlsError {
    /// What a failure of rustls means. `expected`: the name that the peer had to prove.
    pub(super) fn of(error: &rustls::Error, expected: Option<&str>) -> Self {
        use rustls::Error as Rustls;
        match error {
            Rustls::InvalidMessage(
                rustls::InvalidMessage::InvalidContentType
                | rustls::InvalidMessage::UnknownProtocolVersion
                | rustls::InvalidMessage::MessageTooLarge
                | rustls::InvalidMessage::InvalidEmptyPayload,
            ) => Self::NotTls,
            Rustls::InvalidCertificate(fault) => Self::of_certificate(fault, expected),
            Rustls::NoCertificatesPresented => Self::NoCertificate,
            Rustls::AlertReceived(alert) => Self::of_alert(*alert),
            Rustls::PeerIncompatible(_) => Self::Incompatible(error.to_string()),
            _ => Self::Damaged(error.to_string()),
        }
    }

    fn of_certificate(fault: &CertificateError, expected: Option<&str>) -> Self {
        use CertificateError as Fault;
        match fault {
            Fault::NotValidForName | Fault::NotValidForNameContext { .. } => {
                Self::WrongName { expected: expected.unwrap_or_default().to_owned() }
            }
            Fault::UnknownIssuer | Fault::BadSignature => Self::Foreign,
            Fault::Expired | Fault::ExpiredContext { .. } => Self::OutOfTime("expired"),
            Fault::NotValidYet | Fault::NotValidYetContext { .. } => {
                Self::OutOfTime("not valid yet")
            }
            Fault::Revoked => Self::Revoked,
            other => Self::BadCertificate(other.to_string()),
        }
    }

    fn of_alert(alert: AlertDescription) -> Self {
        use AlertDescription as Alert;
        let why = match alert {
            Alert::CertificateRequired => "none was shown",
            Alert::UnknownCA => "it does not know the authority that signed it",
            Alert::CertificateExpired => "it has expired, or is not valid yet",
            Alert::CertificateRevoked => "it was revoked",
            Alert::BadCertificate | Alert::UnsupportedCertificate => "it does not fit",
            Alert::DecryptError => "its signature is not from the authority that it knows",
            Alert::CertificateUnknown => "it is not acceptable",
            Alert::AccessDenied => "access is denied",
            Alert::ProtocolVersion | Alert::HandshakeFailure => {
                return Self::Incompatible(format!("{alert:?}"));
            }
            other => return Self::Alert(format!("{other:?}")),
        };
        Self::Refused(why.to_owned())
    }

    /// What a failed handshake means.
    pub(super) fn of_io(error: &io::Error, expected: Option<&str>) -> Self {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match (inner, error.kind()) {
            (Some(inner), _) => Self::of(inner, expected),
            (
                None,
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe,
            ) => Self::HungUp,
            (None, _) => Self::System(error.to_string()),
        }
    }

    /// What can be done about it.
    pub(crate) fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NotTls | Self::HungUp => "give --tls-dir on both sides, or on none",
            Self::WrongName { .. } => {
                "name the host as its certificate does, or say that name with --tls-peer"
            }
            Self::Foreign | Self::BadCertificate(_) | Self::Revoked => {
                "both sides need certificates of one authority, and its ca-cert.pem"
            }
            Self::OutOfTime(_) => "make a new certificate, or set the clocks right",
            Self::NoCertificate | Self::Refused(_) => {
                "the source needs client-cert.pem and client-key.pem, signed by the destination's \
                 ca-cert.pem"
            }
            Self::Slow { .. } => "check that the other side speaks TLS and is not overloaded",
            Self::Incompatible(_) => "use a version there that speaks TLS 1.3",
            _ => return None,
        };
        Some(text.to_owned())
    }
}
