//! Images made by qemu-img and qemu-io, read by us and by them.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod oracle;
#[path = "../common/skip.rs"]
mod skip;

use oracle::{Images, has_qemu};

/// Writes, zero writes and discards all over a disk, the same for the same seed.
fn commands(seed: u64, size: u64, count: u64, is_compressed: bool, cluster: u64) -> Vec<String> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move |bound: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound.max(1)
    };
    let mut list = Vec::new();
    for n in 0..count {
        let len = (next(size / 8) & !511).max(512);
        let at = next(size - len) & !511;
        let pattern = 1 + n % 250;
        list.push(match next(6) {
            0 => format!("write -z {at} {len}"),
            1 => format!("discard {at} {len}"),
            2 | 3 if is_compressed => {
                let first = at / cluster * cluster;
                let len = cluster.min(size - first);
                format!("write -c -P {pattern} {first} {len}")
            }
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    list
}

#[test]
fn versions_and_cluster_sizes() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    for compat in ["0.10", "1.1"] {
        for bits in [9, 10, 12, 14, 16, 18, 21] {
            let cluster = 1u64 << bits;
            let size = (cluster * 70 + 512 * 3).clamp(300 << 10, 40 << 20);
            let name = format!("{compat}-{bits}.qcow2");
            images.create(&name, &format!("compat={compat},cluster_size={cluster}"), size);
            let commands: Vec<_> = commands(bits, size, 24, true, cluster)
                .into_iter()
                .filter(|c| compat == "1.1" || !c.starts_with("write -z"))
                .collect();
            images.io(&name, "qcow2", &commands);
            images.compare(&name, "qcow2");
        }
    }
}

#[test]
fn refcount_widths() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let name = format!("{bits}.qcow2");
        images.create(&name, &format!("refcount_bits={bits}"), 3 << 20);
        images.io(&name, "qcow2", &commands(bits, 3 << 20, 8, bits > 1, 65536));
        images.compare(&name, "qcow2");
    }
}

#[test]
fn compressed_images() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    let noise: Vec<u8> = (0..5u32 << 20)
        .map(|n| if n & 0x2000 == 0 { (n.wrapping_mul(n) >> 7) as u8 } else { (n >> 12) as u8 })
        .collect();
    std::fs::write(images.path("noise.raw"), &noise[..(5 << 20) - 1536]).unwrap();
    for kind in ["zlib", "zstd"] {
        for (bits, extra) in [(9, ""), (12, ""), (16, ""), (16, ",extended_l2=on"), (21, "")] {
            let name = format!("{kind}-{bits}{extra}.qcow2").replace(',', "-");
            let options = format!("compression_type={kind},cluster_size={}{extra}", 1u64 << bits);
            let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
            images.img(&[&args[..], &["noise.raw", &name]].concat());
            assert_eq!(images.content(&name, "qcow2"), noise[..(5 << 20) - 1536]);
            images.compare(&name, "qcow2");
            images.io(&name, "qcow2", &commands(bits, 5 << 20, 12, true, 1 << bits)[..6]);
            images.compare(&name, "qcow2");
        }
    }
}

#[test]
fn subclusters() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    for bits in [14, 15, 16, 18, 21] {
        let cluster = 1u64 << bits;
        let size = (cluster * 40 + 512).min(21 << 20);
        let name = format!("{bits}.qcow2");
        images.create(&name, &format!("extended_l2=on,cluster_size={cluster}"), size);
        let mut list = commands(bits, size, 20, true, cluster);
        let sub = cluster / 32;
        for n in 0..40 {
            list.push(format!("write -P {} {} {sub}", n + 1, n * 3 * sub));
            list.push(format!("write -z {} {sub}", (n * 7 + 2) * sub));
        }
        images.io(&name, "qcow2", &list);
        images.compare(&name, "qcow2");
    }
}

#[test]
fn preallocated_images() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    for mode in ["metadata", "falloc", "full"] {
        for extra in ["", ",extended_l2=on", ",cluster_size=4k"] {
            let name = format!("{mode}{extra}.qcow2").replace(',', "-");
            images.create(&name, &format!("preallocation={mode}{extra}"), (6 << 20) + 512);
            images.compare(&name, "qcow2");
            images.io(&name, "qcow2", &commands(3, 6 << 20, 12, false, 65536));
            images.compare(&name, "qcow2");
        }
    }
}

#[test]
fn external_data_files() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    for (n, extra) in
        ["", ",data_file_raw=on", ",data_file_raw=on,preallocation=metadata", ",extended_l2=on"]
            .iter()
            .enumerate()
    {
        let name = format!("{n}.qcow2");
        images.create(&name, &format!("data_file={n}.data{extra}"), (5 << 20) + 1024);
        images.compare(&name, "qcow2");
        images.io(&name, "qcow2", &commands(5, 5 << 20, 12, false, 65536));
        images.compare(&name, "qcow2");
    }
}

#[test]
fn raw_files_with_holes() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    images.img(&["create", "-q", "-f", "raw", "a.raw", "9M"]);
    images.io("a.raw", "raw", &["write -P 1 1M 64k".into(), "write -P 2 8M 1M".into()]);
    images.compare("a.raw", "raw");
    let file = std::fs::OpenOptions::new().write(true).open(images.path("a.raw")).unwrap();
    file.set_len((9 << 20) + 100).unwrap();
    let chain = images.open("a.raw");
    assert_eq!(chain.virtual_size(), (9 << 20) + 512);
}

#[test]
fn chains() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    images.img(&["create", "-q", "-f", "raw", "base.raw", "3M"]);
    images.io("base.raw", "raw", &commands(1, 3 << 20, 4, false, 65536));
    let layers: [(&str, &str, u64, &str); 5] = [
        ("l1", "raw", 5 << 20, "cluster_size=4k"),
        ("l2", "qcow2", (4 << 20) + 512, "cluster_size=64k,extended_l2=on"),
        ("l3", "qcow2", 7 << 20, "compat=0.10,cluster_size=512"),
        ("l4", "qcow2", 6 << 20, "compression_type=zstd"),
        ("l5", "qcow2", (6 << 20) + 512, "cluster_size=2M"),
    ];
    let mut below = "base.raw".to_owned();
    std::fs::create_dir(images.path("sub")).unwrap();
    for (n, (name, format, size, options)) in layers.iter().enumerate() {
        let name = format!("{name}.qcow2");
        images.create(
            &name,
            &format!("{options},backing_file={below},backing_fmt={format}"),
            *size,
        );
        let has_zero = !options.contains("0.10");
        let list: Vec<_> = commands(n as u64 + 10, *size, 9, true, 65536)
            .into_iter()
            .filter(|c| has_zero || c.starts_with("write -P"))
            .collect();
        if options.contains("cluster_size") && !options.contains("64k") {
            let plain: Vec<_> = list.into_iter().filter(|c| !c.contains("-c")).collect();
            images.io(&name, "qcow2", &plain);
        } else {
            images.io(&name, "qcow2", &list);
        }
        images.compare(&name, "qcow2");
        below = name;
    }
    assert_eq!(images.open("l5.qcow2").layers().len(), 6);
}

#[test]
fn internal_snapshots_leave_the_active_state() {
    if !has_qemu() {
        return;
    }
    let images = Images::new();
    images.create("s.qcow2", "", 4 << 20);
    images.io("s.qcow2", "qcow2", &commands(1, 4 << 20, 6, true, 65536));
    images.img(&["snapshot", "-c", "one", "s.qcow2"]);
    images.io("s.qcow2", "qcow2", &commands(2, 4 << 20, 6, true, 65536));
    images.img(&["snapshot", "-c", "two", "s.qcow2"]);
    images.io("s.qcow2", "qcow2", &commands(3, 4 << 20, 6, true, 65536));
    images.compare("s.qcow2", "qcow2");
    assert_eq!(images.open("s.qcow2").top().as_qcow2().unwrap().snapshot_count(), 2);
}
