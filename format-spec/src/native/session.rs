//! How a command finds its session again. SPEC 9.

/// Key under which a session is derived.
pub const SESSION_KEY: &[u8; 32] = b"bitferry session of a command   ";

/// The session of whatever `facts` tell apart, the same in every run: the first 16 bytes of the
/// keyed BLAKE3 hash of each fact with its length (le64) before it.
pub fn derive(facts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(SESSION_KEY);
    for fact in facts {
        hasher.update(&(fact.len() as u64).to_le_bytes()).update(fact);
    }
    let mut session = [0; 16];
    hasher.finalize_xof().fill(&mut session);
    session
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_do_not_run_into_each_other() {
        assert_eq!(derive(&[b"a", b"b"]), derive(&[b"a", b"b"]));
        assert_ne!(derive(&[b"a", b"b"]), derive(&[b"ab", b""]));
        assert_ne!(derive(&[b"a"]), derive(&[b"a", b""]));
    }
}
