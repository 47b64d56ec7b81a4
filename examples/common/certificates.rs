//! Certificates for 127.0.0.1, by the names that `--tls-dir` reads.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

use crate::Result;

/// Writes an authority's certificate and, signed by it, those of both sides.
pub(crate) fn make(directory: &Path) -> Result<()> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, "example");
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    std::fs::write(directory.join("ca-cert.pem"), authority.pem())?;
    let roles = [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ];
    for (role, purpose) in roles {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()])?;
        params.extended_key_usages = vec![purpose];
        params.distinguished_name.push(DnType::CommonName, role);
        let key = KeyPair::generate()?;
        let signed = params.signed_by(&key, &authority)?;
        std::fs::write(directory.join(format!("{role}-cert.pem")), signed.pem())?;
        std::fs::write(directory.join(format!("{role}-key.pem")), key.serialize_pem())?;
    }
    Ok(())
}
