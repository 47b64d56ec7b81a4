//! Certificates for a test: an authority of its own and what it signs, as files with QEMU's names.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};

use crate::Scratch;

/// An authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// What a certificate says.
#[derive(Debug, Clone, Copy)]
pub struct Certificate<'a> {
    /// Whom it names.
    pub name: &'a str,
    /// Whether its time is over.
    pub is_expired: bool,
}

impl Authority {
    /// A new one.
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    /// Its certificate.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A directory `name` in `scratch` with the authority's certificate and, signed by it, those of
    /// a destination and a source.
    pub fn directory(
        &self,
        scratch: &Scratch,
        name: &str,
        certificate: Certificate<'_>,
    ) -> PathBuf {
        let directory = scratch.path(name);
        std::fs::create_dir(&directory).expect("directory");
        self.trust(&directory);
        self.sign(&directory, "server", certificate);
        self.sign(&directory, "client", certificate);
        directory
    }

    /// Makes whoever uses the directory believe this authority.
    pub fn trust(&self, directory: &Path) {
        write(directory, "ca-cert.pem", &self.pem());
    }

    /// Signs a certificate for `role`, `server` or `client`.
    pub fn sign(&self, directory: &Path, role: &str, certificate: Certificate<'_>) {
        let mut params = CertificateParams::new([certificate.name.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, role);
        params.extended_key_usages = vec![match role {
            "server" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if certificate.is_expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().expect("a key");
        let signed = params.signed_by(&key, &self.0).expect("a certificate");
        write(directory, &format!("{role}-cert.pem"), &signed.pem());
        write(directory, &format!("{role}-key.pem"), &key.serialize_pem());
    }
}

fn write(directory: &Path, name: &str, text: &str) {
    std::fs::write(directory.join(name), text).expect("a file");
}
