//! Block devices as destinations, and what a copy takes over from its source beside the content.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use bitferry_tests::device::Loop;
use bitferry_tests::faults::with_fault;
use bitferry_tests::image::make;
use bitferry_tests::migration::{command, done};
use bitferry_tests::peer::cannot;
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, json, qemu, require_all};
use rustix::fs::{XattrFlags, getxattr, setxattr};

const MIB: u64 = 1 << 20;

#[test]
fn a_longer_device_takes_the_disk_and_the_report_says_what_is_left() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let size = 8 * MIB;
    let source = make(&scratch, "s.qcow2", size).write(7, MIB, 3 * MIB).done();
    let file = scratch.path("device");
    std::fs::write(&file, vec![0xaa; 11 << 20]).expect("write");
    let Some(device) = Loop::over(&file) else { return };
    let copy = |further: &[&str]| {
        let run = bitferry().words("copy --json -O raw --in-place").args(further);
        run.arg(&source).arg(&device.0).output().expect_exit(Exit::Done)
    };
    let left = "the end of the device: its last 3145728 bytes stay as they are";
    let planned = json::lines(&copy(&["--dry-run"]).text());
    let plan = planned.last().expect("a plan");
    assert_eq!(plan["not-carried"], serde_json::json!([left]), "{plan}");
    let output = copy(&[]);
    let disk = &json::summary(&output)["disks"][0];
    assert_eq!(disk["verified"], "yes", "{output}");
    assert_eq!(disk["not-carried"], serde_json::json!([left]), "{output}");
    drop(device);
    let bytes = std::fs::read(&file).expect("read");
    assert!(bytes[8 << 20..].iter().all(|b| *b == 0xaa), "the rest is touched");
    std::fs::File::options().write(true).open(&file).expect("open").set_len(size).expect("cut");
    qemu::same_content((&source, "qcow2"), (&file, "raw"));
}

#[test]
fn a_shorter_device_is_refused() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 8 * MIB).write(7, MIB, MIB).done();
    let file = scratch.path("device");
    std::fs::write(&file, vec![0xaa; 7 << 20]).expect("write");
    let Some(device) = Loop::over(&file) else { return };
    let run = bitferry().words("copy -O raw --in-place").arg(&source).arg(&device.0);
    run.output().expect_exit(Exit::Usage);
    drop(device);
    assert!(std::fs::read(&file).expect("read").iter().all(|b| *b == 0xaa));
}

/// The command in the hint, which is run as it stands there.
#[track_caller]
fn do_as_told(output: &Output, scratch: &Scratch) {
    let complaint = output.complaint();
    let hint = complaint.split("\nhint: ").nth(1).expect("a hint");
    let command = hint.split('`').nth(1).expect("a command");
    assert!(command.starts_with("qemu-img create "), "{output}");
    let command = command.replace("SIZE", &(8 * MIB).to_string());
    qemu::qemu_img("create")
        .words(command.trim_start_matches("qemu-img create "))
        .dir(scratch.dir())
        .ok();
}

#[test]
fn hints_lead_to_an_image_whose_data_is_on_a_device() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 8 * MIB).bitmap("b", 65536).write(7, MIB, MIB).done();
    let file = scratch.path("device");
    std::fs::write(&file, vec![0; 8 << 20]).expect("write");
    let Some(device) = Loop::over(&file) else { return };
    let copy = |words: &str| bitferry().words(words).dir(scratch.dir()).output().expect_no_crash();
    for how in ["", "--force "] {
        let data = device.0.display();
        let line = format!("copy {how}-o data_file={data},data_file_raw=on s.qcow2 over.qcow2");
        let output = copy(&line).expect_exit(Exit::Usage);
        assert!(output.complaint().contains("--in-place --allow-backing"), "{output}");
        if !how.is_empty() {
            do_as_told(&output, &scratch);
        }
    }
    copy("copy -q --in-place --allow-backing s.qcow2 over.qcow2").expect_exit(Exit::Done);
    let over = scratch.path("over.qcow2");
    qemu::check_is_clean(&over);
    qemu::same_content((&source, "qcow2"), (&over, "qcow2"));
    let ranges = qemu::dirty_ranges(&over, "b").expect("ranges");
    assert_eq!(ranges, [MIB..2 * MIB]);
    drop(device);
    qemu::same_content((&source, "qcow2"), (&file, "raw"));
}

#[test]
fn an_image_on_a_device_is_made_first_and_not_written_over_unasked() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "s.qcow2", 8 * MIB).bitmap("b", 65536).write(7, MIB, MIB).done();
    let file = scratch.path("device");
    std::fs::write(&file, vec![0; 16 << 20]).expect("write");
    let Some(device) = Loop::over(&file) else { return };
    let name = device.0.display();
    let copy = |words: &str| {
        let line = format!("copy -q {words} s.qcow2 {name}");
        bitferry().words(&line).dir(scratch.dir()).output().expect_no_crash()
    };
    assert!(copy("--force").expect_exit(Exit::Usage).complaint().contains("--in-place"));
    let output = copy("--in-place -O qcow2").expect_exit(Exit::Device);
    assert!(output.complaint().contains("holds no qcow2 image"), "{output}");
    do_as_told(&output, &scratch);
    let output = copy("--in-place").expect_exit(Exit::Usage);
    assert!(output.complaint().contains("-O raw or -O qcow2"), "{output}");
    copy("--in-place -O qcow2").expect_exit(Exit::Done);
    qemu::check_is_clean(&device.0);
    assert!(qemu::dirty_ranges(&device.0, "b").is_ok());
}

#[test]
fn a_device_is_a_source() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let raw = make(&scratch, "s.raw", 8 * MIB).format("raw").write(5, MIB, 2 * MIB).done();
    let Some(device) = Loop::over(&raw) else { return };
    let copy = scratch.path("copy.qcow2");
    let run = bitferry().words("copy -q -f raw -O qcow2").arg(&device.0).arg(&copy);
    run.output().expect_exit(Exit::Done);
    drop(device);
    qemu::same_content((&raw, "raw"), (&copy, "qcow2"));
    qemu::check_is_clean(&copy);
    // A device's mode is not a file's.
    assert_eq!(copy.metadata().expect("metadata").mode() & 0o777, 0o600);
}

#[test]
fn owner_mode_and_label_are_the_sources() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 8 * MIB).bitmap("b", 65536).write(5, 0, MIB).done();
    let is_root = std::os::unix::fs::chown(&source, Some(1234), Some(2345)).is_ok();
    let label = b"system_u:object_r:svirt_image_t:s0\0";
    let name = "security.selinux";
    let is_labelled = setxattr(&source, name, label, XattrFlags::empty()).is_ok();
    for (mode, expected) in [(0o640, 0o640), (0o600, 0o600), (0o4755, 0o755), (0o444, 0o444)] {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&source, mode).expect("chmod");
        let data = scratch.path("copy.raw");
        let pair = format!("data_file={},data_file_raw=on", data.display());
        for options in [vec!["--force"], vec!["--force", "-O", "qcow2", "-o", &pair]] {
            let copy = scratch.path("copy.qcow2");
            let run = bitferry().words("copy -q").args(&options).arg(&source).arg(&copy);
            run.output().expect_exit(Exit::Done);
            let files = if options.len() > 1 { vec![copy, data.clone()] } else { vec![copy] };
            for file in files {
                let found = file.metadata().expect("metadata");
                assert_eq!(found.mode() & 0o7777, expected, "{}", file.display());
                if is_root {
                    assert_eq!((found.uid(), found.gid()), (1234, 2345), "{}", file.display());
                }
                if is_labelled {
                    let mut room = vec![0; 100];
                    let len = getxattr(&file, name, room.as_mut_slice()).expect("a label");
                    assert_eq!(&room[..len], label, "{}", file.display());
                }
            }
        }
    }
    if !is_root {
        cannot("only root gives files away");
    }
    let untouched = std::fs::File::open(&source).expect("open");
    let mut magic = [0; 4];
    untouched.read_exact_at(&mut magic, 0).expect("read");
    assert_eq!(&magic, b"QFI\xfb");
}

#[test]
fn no_receipt_speaks_for_an_overlay_whose_data_is_on_a_device() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "s.qcow2", 8 * MIB).write(7, 0, 4 * MIB).bitmap("b", 65536).done();
    let file = scratch.path("device");
    std::fs::write(&file, vec![0; 8 << 20]).expect("write");
    let Some(device) = Loop::over(&file) else { return };
    let options = format!("data_file={},data_file_raw=on", device.0.display());
    let overlay = make(&scratch, "over.qcow2", 8 * MIB).option(options).done();
    // The device by another name: nothing of the one that the overlay knows shows this.
    let other = scratch.path("other");
    let number = device.0.metadata().expect("metadata").rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let made = Run::new("mknod").arg(&other).words(&format!("b {major} {minor}"));
    if !made.works() {
        return cannot("no device can be named here");
    }
    let spoil = || {
        let write = Run::new("dd").words("bs=1 seek=1000000 conv=notrunc,fsync status=none");
        write.arg(format!("of={}", other.display())).stdin("somebody else").ok();
    };
    let is_copy = || {
        let compare = bitferry().words("compare -q --allow-backing");
        compare.arg(scratch.path("s.qcow2")).arg(&overlay).output().expect_exit(Exit::Done);
    };
    let copy = || {
        let line = "copy --json --in-place --allow-backing s.qcow2 over.qcow2";
        json::summary(&command(&scratch, line).output().expect_exit(Exit::Done))
    };
    let migrate = || {
        let receive = "--in-place --allow-backing --disk vda=over.qcow2 unix:socket";
        done(&scratch, "--disk vda=s.qcow2", receive).0
    };
    for write in [&copy as &dyn Fn() -> serde_json::Value, &migrate] {
        for _ in 0..2 {
            let summary = write();
            assert_eq!(summary["status"], "completed", "{summary}");
            assert_eq!(summary["disks"][0]["verified"], "yes", "{summary}");
            is_copy();
            spoil();
        }
    }
    // A new image above a device has a receipt, which does not say what nobody has looked at.
    drop(device);
    let base = make(&scratch, "base.raw", 8 * MIB).format("raw").write(3, 0, MIB).done();
    make(&scratch, "top.qcow2", 8 * MIB).backing("base.raw", "raw").write(5, MIB, 65536).done();
    let below = scratch.path("below.raw");
    std::fs::copy(base, &below).expect("copy");
    let Some(device) = Loop::over(&below) else { return };
    let receive = format!("--backing vda={} --disk vda=new.qcow2 unix:socket", device.0.display());
    for expected in [["completed", "yes"], ["already-complete", "unconfirmed"]] {
        let send = "--shared-base --allow-backing --disk vda=top.qcow2";
        let (sent, received) = done(&scratch, send, &receive);
        for summary in [sent, received] {
            let found = [&summary["status"], &summary["disks"][0]["verified"]];
            assert_eq!(found, expected, "{summary}");
        }
    }
}

#[test]
fn an_access_list_that_cannot_be_carried_leaves_the_copy_to_its_owner() {
    if !require_all(&[Peer::QemuImg, Peer::Strace]) {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", MIB).done();
    std::fs::set_permissions(&source, std::fs::Permissions::from_mode(0o604)).expect("chmod");
    // Version 2; owner, one user, the group, which may do nothing, the mask, others.
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 6, 65534), (4, 0, u32::MAX), (16, 6, u32::MAX), (32, 4, u32::MAX)];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend([tag.to_le_bytes(), permissions.to_le_bytes()].as_flattened());
        list.extend(id.to_le_bytes());
    }
    let name = "system.posix_acl_access";
    if setxattr(&source, name, &list, XattrFlags::empty()).is_err() {
        return cannot("there are no access lists here");
    }
    assert_eq!(source.metadata().expect("metadata").mode() & 0o777, 0o664);
    let found = ["", "error=EOPNOTSUPP"].map(|fault| {
        let copy = scratch.path(&format!("copy{}", fault.len()));
        let words = ["copy", "-q", &source.to_string_lossy(), &copy.to_string_lossy()];
        let run = match fault {
            "" => bitferry().args(words),
            fault => with_fault(&words, "fsetxattr", fault),
        };
        run.output().expect_exit(Exit::Done);
        let mut room = vec![0; 100];
        let len = getxattr(&copy, name, room.as_mut_slice()).unwrap_or(0);
        (copy.metadata().expect("metadata").mode() & 0o777, room[..len].to_vec())
    });
    assert_eq!(found, [(0o664, list), (0o600, Vec::new())]);
}
