//! A real sshd, started for each connection by ssh itself, at the other end of a pipe: no daemon,
//! no port, nothing outside a scratch directory but the user's account.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::peer::{Peer, cannot, require};
use crate::process::Run;
use crate::scratch::Scratch;

/// Says who answers: sshd wants a directory and a user of its own to lock itself into, which are
/// made in a mount namespace of its own where they are missing.
const START: &str = r#"#!/bin/sh
dir=$1; sshd=$2
if [ "$(id -u)" = 0 ]; then
    if [ ! -d /run/sshd ]; then
        mount -t tmpfs none /run && mkdir -m 755 /run/sshd || exit 99
    fi
    if ! grep -q ^sshd: /etc/passwd; then
        # A file of its own: several start at once, and read what another is writing otherwise.
        { cat /etc/passwd; echo sshd:x:65533:65534::/run/sshd:/bin/false; } >"$dir/passwd.$$"
        mount --bind "$dir/passwd.$$" /etc/passwd || exit 99
    fi
fi
exec "$sshd" -i -e -f "$dir/sshd_config" 2>>"$dir/sshd.log"
"#;

/// An ssh whose every host is this one, behind a real sshd.
#[derive(Debug)]
pub struct RealSsh {
    dir: Scratch,
}

impl RealSsh {
    /// Keys and configurations. `None` where there is no sshd, or none can be run here.
    pub fn new() -> Option<Self> {
        let (ssh, sshd) = (require(Peer::Ssh)?, require(Peer::Sshd)?);
        let dir = Scratch::new();
        let path = |name: &str| dir.path(name).display().to_string();
        for key in ["host_key", "user_key"] {
            let run = Run::new("ssh-keygen").words("-q -t ed25519 -N").arg("");
            run.arg("-f").arg(dir.path(key)).ok();
        }
        std::fs::copy(dir.path("user_key.pub"), dir.path("authorized_keys")).expect("copy");
        let host_key = std::fs::read_to_string(dir.path("host_key.pub")).expect("key");
        std::fs::write(dir.path("known_hosts"), format!("bitferry-test {host_key}"))
            .expect("write");
        std::fs::write(dir.path("start"), START).expect("script");
        let sshd_config = format!(
            "HostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\n\
             PermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             PrintMotd no\nLogLevel VERBOSE\n",
            path("host_key"),
            path("authorized_keys"),
        );
        std::fs::write(dir.path("sshd_config"), sshd_config).expect("write");
        let apart = if rustix::process::getuid().is_root() { "unshare -m " } else { "" };
        let start = format!("{apart}sh {} {} {}", path("start"), path(""), sshd.display());
        let ssh_config = format!(
            "Host *\n  ProxyCommand {start}\n  HostKeyAlias bitferry-test\n  User {}\n  \
             IdentityFile {}\n  IdentitiesOnly yes\n  UserKnownHostsFile {}\n  BatchMode yes\n  \
             GlobalKnownHostsFile /dev/null\n  ForwardAgent no\n  ControlMaster no\n",
            Run::new("id").arg("-un").ok().trim(),
            path("user_key"),
            path("known_hosts"),
        );
        std::fs::write(dir.path("ssh_config"), ssh_config).expect("write");
        let client =
            format!("#!/bin/sh\nexec {} -F {} \"$@\"\n", ssh.display(), path("ssh_config"));
        std::fs::write(dir.path("ssh"), client).expect("script");
        std::fs::set_permissions(dir.path("ssh"), PermissionsExt::from_mode(0o755)).expect("mode");
        let ssh = Self { dir };
        let tried = Run::new(ssh.program()).args(["somewhere", "echo here"]).output();
        if tried.text().trim() != "here" {
            cannot(&format!("sshd does not run here: {tried}{}", ssh.log()));
            return None;
        }
        Some(ssh)
    }

    /// The program to be used instead of `ssh`.
    pub fn program(&self) -> PathBuf {
        self.dir.path("ssh")
    }

    /// What sshd said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("sshd.log")).unwrap_or_default()
    }

    fn file(&self, name: &str) -> PathBuf {
        Path::new(self.dir.dir()).join(name)
    }
}
