//! The files of `--tls-dir`, by QEMU's names.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::super::error::{Error, Result};
use super::super::limits::MAX_PEM;
use super::named::Named;

const AUTHORITY: &str = "ca-cert.pem";
/// Taken into account where it is there, as QEMU does.
const REVOKED: &str = "ca-crl.pem";

/// Certificates and keys for one or both roles, and the name that the peer has to prove.
#[derive(Debug, Clone)]
pub struct Tls {
    directory: PathBuf,
    peer: Option<String>,
}

impl Tls {
    /// Uses the files in `directory`: `ca-cert.pem`, `server-cert.pem` and `server-key.pem` to
    /// listen, `client-cert.pem` and `client-key.pem` to connect; `ca-crl.pem` where it is there.
    /// `peer`: the name that the other side has to prove, where it is not the URI's host.
    pub fn new(directory: &Path, peer: Option<String>) -> Self {
        Self { directory: directory.to_owned(), peer }
    }

    /// Who a peer at `host` has to prove to be. `None`: nobody has said.
    pub(in super::super) fn name<'a>(&'a self, host: Option<&'a str>) -> Option<&'a str> {
        self.peer.as_deref().or(host.filter(|h| !h.is_empty()))
    }

    /// What a peer that connects has to prove to be; `None`: nobody has said.
    pub(in super::super) fn peer(&self) -> Option<&str> {
        self.peer.as_deref()
    }

    /// For connecting.
    pub(in super::super) fn client(&self) -> Result<Arc<ClientConfig>> {
        let roots = Arc::new(self.roots()?);
        let failed = |e: &dyn std::error::Error| self.bad(AUTHORITY, e.to_string());
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .with_crls(self.revocations()?)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| failed(&e))?;
        let (chain, key) = self.identity("client")?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| failed(&e))?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(chain, key)
            .map_err(|e| self.bad("client-key.pem", e.to_string()))?;
        // Each connection proves itself afresh.
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// For listening.
    pub(in super::super) fn server(&self) -> Result<Arc<ServerConfig>> {
        let roots = Arc::new(self.roots()?);
        let failed = |e: &dyn std::error::Error| self.bad(AUTHORITY, e.to_string());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .with_crls(self.revocations()?)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| failed(&e))?;
        let verifier: Arc<dyn ClientCertVerifier> = match &self.peer {
            Some(name) => Arc::new(Named { inner: verifier, name: server_name(name)? }),
            None => verifier,
        };
        let (chain, key) = self.identity("server")?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| failed(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| self.bad("server-key.pem", e.to_string()))?;
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn roots(&self) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(AUTHORITY)? {
            roots.add(certificate).map_err(|e| self.bad(AUTHORITY, e.to_string()))?;
        }
        Ok(roots)
    }

    fn identity(
        &self,
        role: &str,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let chain = self.certificates(&format!("{role}-cert.pem"))?;
        let name = format!("{role}-key.pem");
        let key = PrivateKeyDer::from_pem_slice(&self.bytes(&name)?)
            .map_err(|e| self.bad(&name, format!("it holds no private key: {e}")))?;
        Ok((chain, key))
    }

    fn certificates(&self, name: &str) -> Result<Vec<CertificateDer<'static>>> {
        let bytes = self.bytes(name)?;
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
        let found = found.map_err(|e| self.bad(name, e.to_string()))?;
        if found.is_empty() {
            return Err(self.bad(name, "it holds no certificate".to_owned()));
        }
        Ok(found)
    }

    fn revocations(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        if !self.directory.join(REVOKED).exists() {
            return Ok(Vec::new());
        }
        let bytes = self.bytes(REVOKED)?;
        let found: Result<Vec<_>, _> =
            CertificateRevocationListDer::pem_slice_iter(&bytes).collect();
        found.map_err(|e| self.bad(REVOKED, e.to_string()))
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = File::open(self.directory.join(name))
            .and_then(|file| file.take(MAX_PEM).read_to_end(&mut bytes));
        read.map_err(|e| self.bad(name, e.to_string()))?;
        Ok(bytes)
    }

    fn bad(&self, name: &str, reason: String) -> Error {
        Error::TlsFiles { path: self.directory.join(name), reason }
    }
}

/// A name or an address, as it stands in a certificate.
pub(super) fn server_name(name: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(name.to_owned()).map_err(|_| Error::Usage {
        uri: format!("{name:?}"),
        reason: "is no name that a certificate could hold; say it with --tls-peer",
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}
