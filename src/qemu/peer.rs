//! What a QEMU says of itself over QMP: its state, its block nodes, their bitmaps.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::Version;
use super::qmp::{Client, Error, Hurry, Result};

/// A QEMU whose monitor answers.
#[derive(Debug)]
pub struct Peer {
    qmp: Client,
}

/// How a migration stands at one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migration {
    /// QEMU's word: `setup`, `active`, `completed`, `failed`, …; empty before there was any.
    pub status: String,
    /// Why it failed, where QEMU says so.
    pub error: Option<String>,
}

/// A block node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its node name.
    pub name: String,
    /// Guest-visible bytes.
    pub size: u64,
    /// Whether it may not be written.
    pub is_read_only: bool,
    /// Its named bitmaps.
    pub bitmaps: Vec<NodeBitmap>,
    /// Names of bitmaps that its image holds and that are not marked as in use: those that it loads
    /// when it takes the image over.
    pub stored: Vec<String>,
}

/// A bitmap as QEMU describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeBitmap {
    /// Its name.
    pub name: String,
    /// Guest bytes per bit.
    pub granularity: u64,
    /// Dirty bytes: whole granules, beyond the end of the disk too.
    pub count: u64,
    /// Whether it records writes.
    pub is_recording: bool,
    /// Whether something else has it.
    pub is_busy: bool,
    /// Whether it is stored with the disk.
    pub is_persistent: bool,
    /// Whether it is not to be trusted.
    pub is_inconsistent: bool,
}

/// A block backend: the name of a `-drive`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its name, which the migration stream uses.
    pub name: String,
    /// The node at its root.
    pub node: String,
    /// Whether a guest device uses it.
    pub has_guest_device: bool,
}

/// An entry of `block-bitmap-mapping`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeAlias {
    /// The node here.
    pub node: String,
    /// Its name in the stream.
    pub alias: String,
    /// Its bitmaps that take part.
    pub bitmaps: Vec<BitmapAlias>,
}

/// A bitmap in an entry of `block-bitmap-mapping`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapAlias {
    /// Its name here.
    pub name: String,
    /// Its name in the stream.
    pub alias: String,
}

impl Peer {
    /// Connects to a monitor.
    pub fn connect(path: &Path, patience: Duration, hurry: Hurry) -> Result<Self> {
        Ok(Self { qmp: Client::connect(path, patience, hurry)? })
    }

    /// What ends its waiting from another thread.
    pub fn hurry(&self) -> Hurry {
        self.qmp.hurry()
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        let (major, minor, _) = self.qmp.version();
        let number = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        Version::new(number(major), number(minor))
    }

    /// The state of the machine: `inmigrate`, `paused`, `running`, …
    pub fn run_state(&mut self) -> Result<String> {
        const COMMAND: &str = "query-status";
        let answer = self.qmp.execute(COMMAND, json!({}))?;
        text(&answer, "status", COMMAND)
    }

    /// How the migration stands.
    pub fn migration(&mut self) -> Result<Migration> {
        let answer = self.qmp.execute("query-migrate", json!({}))?;
        let word = |key: &str| answer[key].as_str().map(str::to_owned);
        Ok(Migration { status: word("status").unwrap_or_default(), error: word("error-desc") })
    }

    /// The migration capabilities that are switched on.
    pub fn capabilities(&mut self) -> Result<Vec<String>> {
        const COMMAND: &str = "query-migrate-capabilities";
        let answer = self.qmp.execute(COMMAND, json!({}))?;
        let on = list(&answer, COMMAND)?.iter().filter(|capability| flag(capability, "state"));
        on.map(|capability| text(capability, "capability", COMMAND)).collect()
    }

    /// The machine's type, without an alias.
    pub fn machine(&mut self) -> Result<String> {
        const COMMAND: &str = "qom-get";
        let arguments = json!({ "path": "/machine", "property": "type" });
        let answer = self.qmp.execute(COMMAND, arguments)?;
        let class = answer.as_str().ok_or_else(|| missing(COMMAND, "type"))?;
        Ok(class.strip_suffix("-machine").unwrap_or(class).to_owned())
    }

    /// The machine's UUID; `None` where it was given none.
    pub fn uuid(&mut self) -> Result<Option<[u8; 16]>> {
        const COMMAND: &str = "query-uuid";
        let answer = self.qmp.execute(COMMAND, json!({}))?;
        let digits: String = text(&answer, "UUID", COMMAND)?.replace('-', "");
        let number = u128::from_str_radix(&digits, 16).map_err(|_| missing(COMMAND, "UUID"))?;
        Ok((number != 0).then(|| number.to_be_bytes()))
    }

    /// All named nodes.
    pub fn nodes(&mut self) -> Result<Vec<Node>> {
        const COMMAND: &str = "query-named-block-nodes";
        let answer = self.qmp.execute(COMMAND, json!({ "flat": true }))?;
        list(&answer, COMMAND)?.iter().map(|node| Node::read(node, COMMAND)).collect()
    }

    /// All block backends that hold something.
    pub fn devices(&mut self) -> Result<Vec<Device>> {
        const COMMAND: &str = "query-block";
        let answer = self.qmp.execute(COMMAND, json!({}))?;
        let devices = list(&answer, COMMAND)?.iter();
        let devices = devices.filter_map(|device| {
            let name = device["device"].as_str().filter(|name| !name.is_empty())?;
            let node = device["inserted"]["node-name"].as_str()?;
            let has_guest_device = device["qdev"].is_string();
            Some(Device { name: name.to_owned(), node: node.to_owned(), has_guest_device })
        });
        Ok(devices.collect())
    }

    /// How names in the stream are mapped to nodes; `None` where they are not.
    pub fn bitmap_mapping(&mut self) -> Result<Option<Vec<NodeAlias>>> {
        const COMMAND: &str = "query-migrate-parameters";
        let answer = self.qmp.execute(COMMAND, json!({}))?;
        let mapping = &answer["block-bitmap-mapping"];
        if mapping.is_null() {
            return Ok(None);
        }
        let aliases = list(mapping, COMMAND)?.iter().map(|entry| {
            let bitmaps = list(&entry["bitmaps"], COMMAND)?.iter().map(|bitmap| {
                let name = text(bitmap, "name", COMMAND)?;
                Ok(BitmapAlias { name, alias: text(bitmap, "alias", COMMAND)? })
            });
            Ok(NodeAlias {
                node: text(entry, "node-name", COMMAND)?,
                alias: text(entry, "alias", COMMAND)?,
                bitmaps: bitmaps.collect::<Result<_>>()?,
            })
        });
        aliases.collect::<Result<_>>().map(Some)
    }

    /// What the names in a stream mean.
    pub fn inventory(&mut self) -> Result<Inventory> {
        Ok(Inventory {
            devices: self.devices()?,
            nodes: self.nodes()?,
            mapping: self.bitmap_mapping()?,
        })
    }

    /// QEMU's hash of a bitmap's bits; see [`bitmap_sha256`](super::bitmap_sha256).
    pub fn bitmap_sha256(&mut self, node: &str, bitmap: &str) -> Result<String> {
        const COMMAND: &str = "x-debug-block-dirty-bitmap-sha256";
        let answer = self.qmp.execute(COMMAND, json!({ "node": node, "name": bitmap }))?;
        text(&answer, "sha256", COMMAND)
    }
}

/// What a stream's names mean at a QEMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Its block backends.
    pub devices: Vec<Device>,
    /// Its block nodes.
    pub nodes: Vec<Node>,
    /// Its `block-bitmap-mapping`, if it has one.
    pub mapping: Option<Vec<NodeAlias>>,
}

impl Inventory {
    /// The block backend of that name.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// The node that the stream's device `name` stands for where there is no mapping: a backend's
    /// root, else the node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        let node = self.device(name).map_or(name, |device| device.node.as_str());
        self.nodes.iter().find(|found| found.name == node)
    }

    /// The node and the name that the stream's `bitmap` of `device` gets. `Err`: why QEMU will drop
    /// it, and every other bitmap that is not complete by then, without failing.
    pub fn place<'a>(
        &'a self,
        device: &'a str,
        bitmap: &'a str,
    ) -> Result<(&'a Node, &'a str), String> {
        let Some(mapping) = &self.mapping else {
            let node = self.node(device);
            let node = node.ok_or_else(|| format!("the destination has no node {device:?}"))?;
            return Ok((node, bitmap));
        };
        let unmapped = |what: &str, alias: &str| {
            format!("the destination's block-bitmap-mapping has no {what} with the alias {alias:?}")
        };
        let entry = mapping.iter().find(|entry| entry.alias == device);
        let entry = entry.ok_or_else(|| unmapped("node", device))?;
        let alias = entry.bitmaps.iter().find(|alias| alias.alias == bitmap);
        let alias = alias.ok_or_else(|| unmapped("bitmap", bitmap))?;
        let node = self.node(&entry.node);
        let node = node.ok_or_else(|| format!("the destination has no node {:?}", entry.node))?;
        Ok((node, &alias.name))
    }
}

impl Node {
    /// Its bitmap of that name.
    pub fn bitmap(&self, name: &str) -> Option<&NodeBitmap> {
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }

    fn read(node: &Value, command: &'static str) -> Result<Self> {
        let bitmaps = match &node["dirty-bitmaps"] {
            Value::Null => Vec::new(),
            // Those without a name belong to jobs.
            found => list(found, command)?
                .iter()
                .filter(|bitmap| bitmap["name"].is_string())
                .map(|bitmap| NodeBitmap::read(bitmap, command))
                .collect::<Result<_>>()?,
        };
        Ok(Self {
            name: text(node, "node-name", command)?,
            size: number(&node["image"], "virtual-size", command)?,
            is_read_only: flag(node, "ro"),
            bitmaps,
            stored: stored(&node["image"]),
        })
    }
}

/// The bitmaps in an image that are loaded with it. Only qcow2 has them, and only from version 3.
fn stored(image: &Value) -> Vec<String> {
    let listed = image["format-specific"]["data"]["bitmaps"].as_array();
    let is_loaded = |bitmap: &&Value| {
        let flags = bitmap["flags"].as_array();
        !flags.is_some_and(|flags| flags.iter().any(|flag| flag == "in-use"))
    };
    let names = listed.into_iter().flatten().filter(is_loaded);
    names.filter_map(|bitmap| bitmap["name"].as_str().map(str::to_owned)).collect()
}

impl NodeBitmap {
    fn read(bitmap: &Value, command: &'static str) -> Result<Self> {
        Ok(Self {
            name: text(bitmap, "name", command)?,
            granularity: number(bitmap, "granularity", command)?,
            count: number(bitmap, "count", command)?,
            is_recording: flag(bitmap, "recording"),
            is_busy: flag(bitmap, "busy"),
            is_persistent: flag(bitmap, "persistent"),
            is_inconsistent: flag(bitmap, "inconsistent"),
        })
    }
}

fn missing(command: &str, key: &str) -> Error {
    Error::Malformed { command: command.to_owned(), problem: format!("lacks a usable {key:?}") }
}

fn list<'a>(value: &'a Value, command: &str) -> Result<&'a [Value]> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| missing(command, "list"))
}

fn text(value: &Value, key: &str, command: &str) -> Result<String> {
    value[key].as_str().map(str::to_owned).ok_or_else(|| missing(command, key))
}

fn number(value: &Value, key: &str, command: &str) -> Result<u64> {
    value[key].as_u64().ok_or_else(|| missing(command, key))
}

/// QEMU leaves out what is false, in places.
fn flag(value: &Value, key: &str) -> bool {
    value[key].as_bool().unwrap_or(false)
}
