//! What the machine's AES-256-GCM gives, without any socket.

use std::time::{Duration, Instant};

use rustls::crypto::aws_lc_rs;
use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks,
    OutboundPlainMessage,
};
use rustls::{ContentType, ProtocolVersion, SupportedCipherSuite};

use crate::Result;

/// Plaintext of the longest record.
const RECORD: usize = 16 << 10;

/// How long `mib` MiB take to be sealed, and to be opened, each on one core by itself, in records
/// as TLS has them.
pub(crate) fn times(mib: usize) -> Result<(Duration, Duration)> {
    let SupportedCipherSuite::Tls13(suite) = aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384;
    let key = || AeadKey::from([7; 32]);
    let iv = || Iv::from([9; 12]);
    let (mut sealer, mut opener) =
        (suite.aead_alg.encrypter(key(), iv()), suite.aead_alg.decrypter(key(), iv()));
    let records = (mib << 20) / RECORD;
    let plain = vec![0x5a; RECORD];
    let begun = Instant::now();
    for number in 0..records as u64 {
        std::hint::black_box(seal(&mut *sealer, &plain, number)?);
    }
    let sealing = begun.elapsed();
    // Opened where it lies; the copy that undoes it is not counted.
    let last = records as u64;
    let sealed = seal(&mut *sealer, &plain, last)?;
    let mut opening = Duration::ZERO;
    let mut record = sealed.clone();
    for _ in 0..records {
        record.copy_from_slice(&sealed);
        let begun = Instant::now();
        open(&mut *opener, &mut record, last)?;
        opening += begun.elapsed();
    }
    Ok((sealing, opening))
}

fn seal(sealer: &mut dyn MessageEncrypter, plain: &[u8], number: u64) -> Result<Vec<u8>> {
    let message = OutboundPlainMessage {
        typ: ContentType::ApplicationData,
        version: ProtocolVersion::TLSv1_2,
        payload: OutboundChunks::Single(plain),
    };
    Ok(sealer.encrypt(message, number)?.encode())
}

fn open(opener: &mut dyn MessageDecrypter, record: &mut [u8], number: u64) -> Result<()> {
    let (_, body) = record.split_at_mut(5);
    let message =
        InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, body);
    std::hint::black_box(opener.decrypt(message, number)?.payload.len());
    Ok(())
}
