//! What the destination would die of, found by asking its monitor first. Pure but for the asking.

use super::chunks::CHUNK;
use super::plan::PlannedBitmap;
use crate::Observer;
use crate::qemu::peer::{Inventory, Peer};
use crate::qemu::{Error, Result, Subject};

/// State of a QEMU that waits for a migration.
const WAITING: &str = "inmigrate";

/// Capabilities with which it waits for more than one connection, or for other streams.
const IN_THE_WAY: [&str; 3] = ["multifd", "x-ignore-shared", "mapped-ram"];

/// What is to be sent.
pub(crate) struct Wish<'a> {
    /// Contents, by name and size.
    pub(crate) disks: Vec<(&'a str, u64)>,
    /// Bitmaps.
    pub(crate) bitmaps: &'a [PlannedBitmap],
    /// Machine type; empty if none.
    pub(crate) machine: &'a str,
    /// The machine's UUID.
    pub(crate) uuid: Option<[u8; 16]>,
}

/// Asks the destination whether it can take it.
pub(crate) fn check(
    wish: &Wish<'_>,
    peer: &mut Peer,
    observer: &dyn Observer,
) -> crate::Result<()> {
    let state = peer.run_state().map_err(Error::from)?;
    if state != WAITING {
        let reason = format!(
            "the QEMU behind --peer-qmp does not wait for a migration, it is {state:?}: give the \
             monitor of one that was started with -incoming"
        );
        return Err(crate::Error::Usage { reason });
    }
    check_machine(wish, peer)?;
    let inventory = peer.inventory().map_err(Error::from)?;
    for disk in &wish.disks {
        check_disk(*disk, &inventory)?;
    }
    for bitmap in wish.bitmaps {
        if let Some(warning) = check_bitmap(bitmap, &inventory)? {
            observer.warning(&warning);
        }
    }
    Ok(())
}

/// Of bitmaps that have come meanwhile, those that the destination cannot take are taken out: with
/// the reasons. A monitor that does not answer now is no reason.
pub(crate) fn refuse_late(
    bitmaps: &mut Vec<PlannedBitmap>,
    is_known: impl Fn(&PlannedBitmap) -> bool,
    peer: &mut Peer,
    observer: &dyn Observer,
) -> Vec<(PlannedBitmap, String)> {
    if bitmaps.iter().all(&is_known) {
        return Vec::new();
    }
    let Ok(inventory) = peer.inventory() else { return Vec::new() };
    let mut refused = Vec::new();
    bitmaps.retain(|bitmap| {
        if is_known(bitmap) {
            return true;
        }
        match check_bitmap(bitmap, &inventory) {
            Ok(warning) => {
                warning.iter().for_each(|warning| observer.warning(warning));
                true
            }
            Err(Error::Unfit { reason, .. }) => {
                refused.push((bitmap.clone(), reason));
                false
            }
            Err(_) => true,
        }
    });
    refused
}

/// Whether the machine is the one that is meant, and waits for such a stream.
fn check_machine(wish: &Wish<'_>, peer: &mut Peer) -> Result<()> {
    let unready = |reason: String| Err(Error::Unready { reason });
    let capabilities = peer.capabilities()?;
    if let Some(name) = capabilities.iter().find(|name| IN_THE_WAY.contains(&name.as_str())) {
        return unready(format!(
            "the capability {name:?} is on at the destination, which waits for another kind of \
             stream then: switch it off with `migrate-set-capabilities` before `migrate-incoming`"
        ));
    }
    if !wish.machine.is_empty() {
        let machine = peer.machine()?;
        // QEMU looks at as many bytes as it is given.
        if !machine.starts_with(wish.machine) {
            let asked = wish.machine;
            return unready(format!(
                "the machine there is a {machine:?}, and --machine says {asked:?}"
            ));
        }
    }
    if let Some(uuid) = wish.uuid
        && let Some(found) = peer.uuid()?
        && found != uuid
    {
        let hex = |uuid| format!("{:032x}", u128::from_be_bytes(uuid));
        let (found, asked) = (hex(found), hex(uuid));
        return unready(format!("the machine there has the UUID {found}, and --uuid says {asked}"));
    }
    Ok(())
}

/// Whether the destination can write the contents of a disk.
fn check_disk((id, size): (&str, u64), inventory: &Inventory) -> Result<()> {
    let unfit = |reason: String| {
        let subject = Subject { disk: id.to_owned(), bitmap: None };
        Err(Error::Unfit { subject, reason })
    };
    let (Some(device), Some(node)) = (inventory.device(id), inventory.node(id)) else {
        let names: Vec<_> = inventory.devices.iter().map(|d| format!("{:?}", d.name)).collect();
        return unfit(format!(
            "the destination has no block backend of that name (it has {}), and contents are not \
             sent to nodes: start it with -drive if=none,id={id}",
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        ));
    };
    if !device.has_guest_device {
        return unfit(format!(
            "no guest device uses it at the destination, and QEMU would abort: start it with \
             -device virtio-blk-pci,drive={id}"
        ));
    }
    if node.is_read_only {
        return unfit("it is read-only at the destination".to_owned());
    }
    if node.size < size {
        let has = node.size;
        return unfit(format!("the destination's disk has {has} bytes, and {size} are to be sent"));
    }
    if size < CHUNK && node.size > size {
        let has = node.size;
        return unfit(format!(
            "the destination's disk has {has} bytes: the zeroes of a disk of {size} bytes would \
             reach beyond it, give one of the same size"
        ));
    }
    Ok(())
}

/// Whether the destination can create a bitmap. A warning where it would drop it and go on: that is
/// seen and reported in the end.
fn check_bitmap(bitmap: &PlannedBitmap, inventory: &Inventory) -> Result<Option<String>> {
    let wire = &bitmap.wire;
    let (node, name) = match inventory.place(&wire.device, &wire.name) {
        Ok(place) => place,
        Err(why) => {
            return Ok(Some(format!(
                "{why}: it will drop bitmap {:?} of disk {:?}, and perhaps all, and not fail",
                wire.name, wire.device
            )));
        }
    };
    let unfit = |reason: String| {
        let subject = Subject { disk: wire.device.clone(), bitmap: Some(wire.name.clone()) };
        Err(Error::Unfit { subject, reason })
    };
    if node.bitmap(name).is_some() {
        return unfit(format!(
            "the destination's node {:?} has a bitmap {name:?} already: remove it there, or use \
             --rename-bitmap",
            node.name
        ));
    }
    // It would take the bitmap, and fail to open the image when it is to run: the guest would be
    // without its disk. One that is marked as in use it leaves alone.
    if node.stored.iter().any(|stored| stored == name) {
        return unfit(format!(
            "the image of the destination's node {:?} holds a bitmap {name:?} already, and QEMU \
             would lose the disk as soon as it runs. Is it the very image that is sent, or a \
             copy of it with its bitmaps, QEMU loads them by itself and nothing has to be sent; \
             else remove it before that QEMU is started (`bitferry bitmap remove`), or use \
             --rename-bitmap",
            node.name
        ));
    }
    if node.size != wire.disk_size {
        return unfit(format!(
            "the destination's node {:?} has {} bytes and the bitmap is of a disk of {} bytes: \
             QEMU would abort",
            node.name, node.size, wire.disk_size
        ));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::outgoing::bitmaps::OutgoingBitmap;
    use crate::qemu::peer::{BitmapAlias, Device, Node, NodeAlias, NodeBitmap};

    fn inventory() -> Inventory {
        let device = |name: &str, node: &str, has_guest_device| Device {
            name: name.to_owned(),
            node: node.to_owned(),
            has_guest_device,
        };
        let taken = NodeBitmap {
            name: "taken".to_owned(),
            granularity: 65536,
            count: 0,
            is_recording: true,
            is_busy: false,
            is_persistent: true,
            is_inconsistent: false,
        };
        let node = |name: &str, size, is_read_only| Node {
            name: name.to_owned(),
            size,
            is_read_only,
            bitmaps: vec![taken.clone()],
            stored: vec!["stored".to_owned()],
        };
        Inventory {
            devices: vec![
                device("d0", "n0", true),
                device("bare", "n0", false),
                device("cd", "n1", true),
            ],
            nodes: vec![node("n0", 4096, false), node("n1", 4096, true)],
            mapping: None,
        }
    }

    #[test]
    fn contents_need_a_backend_with_a_device_and_room() {
        let check = |id, size| check_disk((id, size), &inventory()).err().map(|e| e.to_string());
        assert_eq!(check("d0", 4096), None);
        for (id, size, says) in [
            ("d0", 512, "same size"),
            ("d0", 8192, "has 4096 bytes"),
            ("n0", 4096, "-drive if=none,id=n0"),
            ("bare", 4096, "virtio-blk-pci"),
            ("cd", 4096, "read-only"),
        ] {
            let said = check(id, size).expect("refused");
            assert!(said.contains(says) && said.contains(id), "{said}");
        }
    }

    fn bitmap(device: &str, name: &str, disk_size: u64) -> PlannedBitmap {
        let wire = OutgoingBitmap {
            device: device.to_owned(),
            name: name.to_owned(),
            disk_size,
            granularity: 65536,
            is_enabled: true,
            is_persistent: true,
        };
        PlannedBitmap { disk: 0, source_name: "x".to_owned(), wire }
    }

    #[test]
    fn bitmaps_need_a_free_name_and_the_same_size() {
        let check = |device, name, size| check_bitmap(&bitmap(device, name, size), &inventory());
        assert_eq!(check("d0", "b", 4096).unwrap(), None);
        assert_eq!(check("n0", "b", 4096).unwrap(), None);
        assert!(check("nowhere", "b", 4096).unwrap().is_some());
        assert!(check("d0", "taken", 4096).unwrap_err().to_string().contains("--rename-bitmap"));
        let said = check("d0", "stored", 4096).unwrap_err().to_string();
        assert!(said.contains("bitferry bitmap remove"), "{said}");
        assert!(check("d0", "b", 8192).unwrap_err().to_string().contains("abort"));
    }

    #[test]
    fn a_mapping_hides_what_it_does_not_name() {
        let bitmaps = vec![BitmapAlias { name: "taken".to_owned(), alias: "b".to_owned() }];
        let alias = NodeAlias { node: "n0".to_owned(), alias: "X".to_owned(), bitmaps };
        let inventory = Inventory { mapping: Some(vec![alias]), ..inventory() };
        let check = |device, name| check_bitmap(&bitmap(device, name, 4096), &inventory);
        assert!(check("d0", "b").unwrap().unwrap().contains("alias \"d0\""));
        assert!(check("X", "c").unwrap().unwrap().contains("alias \"c\""));
        assert!(check("X", "b").unwrap_err().to_string().contains("\"taken\""));
    }
}
