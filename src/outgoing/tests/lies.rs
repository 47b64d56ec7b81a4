//! Sources that lie, each named by the destination; floods; random records.

use format_spec::Writer;
use format_spec::native::block::{
    BitmapCreate, BitmapSeal, BitmapShape, BitmapVersion, BlockRecord, Disk, DiskSeal, Run,
};
use format_spec::native::control::Control;
use format_spec::native::frame::{self, CHECKSUM, COMPRESSED, Header};
use format_spec::native::hello::{Hello, Join, MULTI_CHANNEL, Offer, ZSTD};
use format_spec::qemu::container::{self, Element, Section, SectionKind, SectionName};
use mig_core::stream::StreamReader;
use proptest::prelude::*;

use super::*;

pub(super) const SIZE: u64 = (1 << 20) + 512;
pub(super) const D: DiskId = DiskId(0);
const CONTROL_ID: u32 = 1;
const BLOCK_ID: u32 = 2;

pub(super) fn offer(channels: u16, features: u64) -> Offer {
    Offer {
        session: SESSION,
        is_one_way: false,
        features: features | if channels > 1 { MULTI_CHANNEL } else { 0 },
        required: 0,
        channels,
        program: String::new(),
    }
}

/// The bytes of a connection, put together by hand.
#[derive(Default, Clone)]
pub(super) struct Script(Vec<u8>);

impl Script {
    /// Main up to where records of disks may come: both sections started.
    pub(super) fn main() -> Self {
        let mut out = Writer::new();
        container::encode_start(&mut out);
        Self(out.into_bytes())
            .section(SectionKind::Start, CONTROL_ID, Some(("bitferry", 1)), &[])
            .section(SectionKind::Start, BLOCK_ID, Some(("block", 2)), &[])
    }

    fn section(
        mut self,
        kind: SectionKind,
        id: u32,
        name: Option<(&str, u32)>,
        body: &[u8],
    ) -> Self {
        let name = name.map(|(name, version)| SectionName { name, instance: 0, version });
        let mut out = Writer::new();
        Section { id, kind, name }.encode(&mut out);
        self.0.extend(out.into_bytes());
        self.0.extend(body);
        frame::encode_end(&mut self.0);
        let mut out = Writer::new();
        container::encode_footer(id, &mut out);
        self.0.extend(out.into_bytes());
        self
    }

    pub(super) fn block(self, records: &[BlockRecord<'_>]) -> Self {
        let mut body = Vec::new();
        records.iter().for_each(|record| record.encode(&mut body));
        self.section(SectionKind::Part, BLOCK_ID, None, &body)
    }

    pub(super) fn control(self, controls: &[Control]) -> Self {
        let mut body = Vec::new();
        controls.iter().for_each(|control| control.encode(&mut body));
        self.section(SectionKind::Part, CONTROL_ID, None, &body)
    }

    pub(super) fn barrier(self, number: u64) -> Self {
        self.control(&[Control::Barrier { number, is_durable: false }])
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

/// Sends a script behind a good hello and answers what the destination says of it: in its error,
/// which is also what the source is told.
fn lie_on(channels: u16, features: u64, scripts: &[Script]) -> String {
    let shelf = Arc::new(Shelf::default());
    let net = Net::new(None);
    let said = std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let main = net.accept(None).unwrap();
            let options = IncomingOptions { timing: timing(), ..IncomingOptions::new(&Unwatched) };
            receive(main, &net, shelf.clone(), Registry::new(), &options)
        });
        let main = net.dial().unwrap();
        let mut writer = main.writer;
        writer.write_all(&Hello::Offer(offer(channels, features)).encode()).unwrap();
        let mut reader = StreamReader::new(main.reader, 0);
        let Hello::Choice(choice) = reader.hello().unwrap() else { panic!() };
        let mut lines = Vec::new();
        for (channel, script) in (0..).zip(scripts) {
            let mut connection = if channel == 0 { None } else { Some(net.dial().unwrap()) };
            if let Some(connection) = &mut connection {
                let (session, ticket) = (SESSION, choice.ticket);
                let join = Hello::Join(Join { session, ticket, channel }).encode();
                connection.writer.write_all(&join).unwrap();
            }
            let writer = connection.as_mut().map_or(&mut writer, |c| &mut c.writer);
            // It may have been cut off for an earlier lie already.
            let _ = writer.write_all(&script.0);
            lines.push(connection);
        }
        let buffers = stream::Buffers::new(1);
        let mut failed = None;
        while let Ok(arrival) = reader.record(&buffers) {
            let answer = format_spec::native::answer::Answer::decode(&arrival.record());
            if let Ok(Some(format_spec::native::answer::Answer::Failed { text, .. })) = answer {
                failed = Some(text);
                break;
            }
        }
        main.line.hang_up();
        let error = destination.join().unwrap().unwrap_err();
        let said = crate::report::error_chain(&error);
        assert_eq!(failed.as_deref(), Some(said.as_str()));
        said
    });
    assert!(!shelf.0.lock().unwrap().is_committed);
    said
}

pub(super) fn lie(script: Script) -> String {
    lie_on(1, 0, &[script])
}

pub(super) fn vda() -> BlockRecord<'static> {
    BlockRecord::Disk(Disk { disk: D, keeps_rest: false, size: SIZE, name: "vda" })
}

pub(super) fn create(number: u32, generation: u32, granularity: u32) -> BlockRecord<'static> {
    BlockRecord::BitmapCreate(BitmapCreate {
        version: BitmapVersion { bitmap: number, generation },
        disk: D,
        shape: BitmapShape::of_disk(SIZE, granularity),
        is_enabled: true,
        is_persistent: true,
        name: "b",
    })
}

pub(super) fn zeroes(offset: u64, len: u64) -> BlockRecord<'static> {
    BlockRecord::Run(Run::zeroes(D, offset, len))
}

pub(super) fn seal() -> BlockRecord<'static> {
    BlockRecord::DiskSeal(DiskSeal { disk: D, hash: None })
}

#[test]
fn every_lie_about_disks_is_named() {
    let other_hash = BlockRecord::DiskSeal(DiskSeal {
        disk: D,
        hash: Some(format_spec::content_hash::ContentHash([0; 32])),
    });
    let whole = zeroes(0, SIZE);
    let cases: Vec<(&str, Vec<BlockRecord<'_>>)> = vec![
        ("never introduced", vec![zeroes(0, SIZE)]),
        ("twice", vec![vda(), vda()]),
        ("outside", vec![vda(), zeroes(65536, SIZE)]),
        ("not a multiple", vec![vda(), zeroes(0, 512)]),
        ("nothing came for byte 65536", vec![vda(), zeroes(0, 65536), seal()]),
        ("after its seal", vec![vda(), whole.clone(), seal(), whole.clone()]),
        ("sealed twice", vec![vda(), whole.clone(), seal(), seal()]),
    ];
    for (word, records) in cases {
        let said = lie(Script::main().block(&records));
        assert!(said.contains(word) && said.contains("offset"), "{word}: {said}");
    }
    let prepare = |records: &[BlockRecord<'_>]| {
        lie(Script::main().block(records).barrier(1).control(&[Control::Prepare(SESSION)]))
    };
    for (word, records) in [
        ("disk \"vda\" is not sealed", vec![vda(), whole.clone()]),
        (
            "bitmap \"b\" of disk \"vda\" is not sealed",
            vec![vda(), create(0, 1, 512), whole.clone(), seal()],
        ),
        ("the source sealed bf1:00", vec![vda(), whole, other_hash]),
    ] {
        let said = prepare(&records);
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn every_lie_about_the_order_is_named() {
    let sealed = || Script::main().block(&[vda(), zeroes(0, SIZE), seal()]);
    let prepare = || Control::Prepare(SESSION);
    let mut eof = Writer::new();
    Element::Eof.encode(&mut eof);
    let start = |id, name, version| {
        Script::main().section(SectionKind::Start, id, Some((name, version)), &[])
    };
    let unknown = Header { body_len: 0, kind: 77, flags: CHECKSUM }.encode();
    let unknown = [&unknown[..], &[0; 4]].concat();
    let bomb = Header { body_len: 8, kind: 2, flags: CHECKSUM | COMPRESSED }.encode();
    let body = [0x7f, 0xff, 0xff, 0xff, 1, 2, 3, 4];
    let bomb = [&bomb[..], &body, &frame::checksum(&[&body]).to_be_bytes()].concat();
    let part = |body: &[u8]| Script::main().section(SectionKind::Part, BLOCK_ID, None, body);
    let wrong = Control::Prepare([8; 16]);
    let cases = [
        ("barrier 2 comes where 1 is expected", sealed().barrier(2)),
        ("barrier 1 comes where 2 is expected", sealed().barrier(1).barrier(1)),
        ("before the first barrier", sealed().control(&[prepare()])),
        ("without READY", sealed().barrier(1).control(&[Control::Commit(SESSION)])),
        ("PREPARE comes twice", sealed().barrier(1).control(&[prepare(), prepare()])),
        ("another session", sealed().barrier(1).control(&[wrong])),
        ("ends before COMMIT", sealed().barrier(1).raw(&eof.into_bytes())),
        ("\"ram\", instance 0, is not known", start(3, "ram", 4)),
        ("version 9", start(3, "block", 9)),
        ("started twice", start(2, "block", 2)),
        ("bitferry is first", start(3, "bitferry", 1)),
        ("section 9 was not started", Script::main().section(SectionKind::Part, 9, None, &[])),
        (
            "section id in the footer",
            Script::main()
                .raw(&[2, 0, 0, 0, 2])
                .raw(&[0; 4])
                .raw(&[0, 0, 0, 0])
                .raw(&crc_of_end())
                .raw(&[0x7e, 0, 0, 0, 7]),
        ),
        ("element type", Script::main().raw(&[8])),
        ("record type", part(&unknown)),
        ("no compression was chosen", part(&bomb)),
        ("record header checksum", part(&[1; 12])),
        ("stream magic", Script::default().raw(b"QEVX\0\0\0\x03")),
    ];
    for (word, script) in cases {
        let said = lie(script);
        assert!(said.contains(word), "{word}: {said}");
    }
    let said = lie_on(1, ZSTD, &[part(&bomb)]);
    assert!(said.contains("2147483647"), "{said}");
}

/// The checksum of the header of END.
fn crc_of_end() -> [u8; 4] {
    let mut end = Vec::new();
    frame::encode_end(&mut end);
    [end[8], end[9], end[10], end[11]]
}

#[test]
fn data_channels_have_their_own_rules() {
    let main = || Script::main().block(&[vda()]);
    let data = Script::default;
    let two = |main: Script, data: Script| lie_on(2, 0, &[main, data]);
    let start = data().section(SectionKind::Start, 3, Some(("block", 2)), &[]);
    let run_early = data().block(&[zeroes(0, SIZE)]);
    let seal_there = data().barrier(1).block(&[seal()]);
    let prepare_there = data().barrier(1).control(&[Control::Prepare(SESSION)]);
    let durable = Control::Barrier { number: 1, is_durable: true };
    let mut eof = Writer::new();
    Element::Eof.encode(&mut eof);
    let over = data().barrier(1).raw(&eof.into_bytes());
    let sealed = main().block(&[zeroes(0, SIZE), seal()]);
    let late = data().barrier(1).block(&[zeroes(0, 65536)]);
    let cases = [
        ("starts or ends on a data channel", two(main(), start)),
        ("was not started", two(Script::default(), run_early)),
        ("belongs on main", two(main().barrier(1), seal_there)),
        ("handover has its place on main", two(main().barrier(1), prepare_there)),
        ("durable on some", two(main().barrier(1), data().control(&[durable]))),
        ("ends before COMMIT", two(main().barrier(1), over)),
        // No barrier between runs and seals: what comes behind them is noticed at either end.
        ("nothing came for byte 0", two(main().block(&[seal()]), data().barrier(1))),
        ("goes on after its seal", two(sealed.barrier(1), late)),
    ];
    for (word, said) in cases {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn strangers_and_floods_do_not_keep_the_source_out() {
    let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
    let net = Net::new(None);
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let main = net.accept(None).unwrap();
            let options = IncomingOptions { timing: timing(), ..IncomingOptions::new(&Unwatched) };
            receive(main, &net, shelf.clone(), Registry::new(), &options)
        });
        // Between its first connection and the others, a source is overtaken by many.
        struct Late<'n>(&'n Net, Mutex<Vec<UnixStream>>);
        impl Dial for Late<'_> {
            fn nature(&self) -> Nature {
                self.0.nature
            }
            fn dial(&self) -> io::Result<Connection> {
                let mut strangers = self.1.lock().unwrap();
                if self.0.state.lock().unwrap().dialled > 0 {
                    for n in 0..60u8 {
                        let mut stranger = self.0.stranger();
                        match n % 3 {
                            0 => {}
                            1 => stranger.write_all(b"GET / HTTP/1.1\r\n\r\n........").unwrap(),
                            _ => {
                                let (session, ticket) = (SESSION, [n; 16]);
                                let join = Join { session, ticket, channel: 1 };
                                stranger.write_all(&Hello::Join(join).encode()).unwrap();
                            }
                        }
                        strangers.push(stranger);
                    }
                }
                self.0.dial()
            }
        }
        let late = Late(&net, Mutex::default());
        let options = OutgoingOptions {
            channels: 3,
            timing: timing(),
            ..OutgoingOptions::new(SESSION, &Unwatched)
        };
        let sent = send(&late, cargo.handlers(true), &mut (), &mut AtRest, &options).unwrap();
        assert!(matches!(sent.outcome, Outcome::Completed));
        destination.join().unwrap().unwrap();
        // Every stranger was closed.
        for mut stranger in late.1.into_inner().unwrap() {
            let mut rest = Vec::new();
            let _ = stranger.read_to_end(&mut rest);
            assert!(rest.is_empty());
        }
    });
    assert!(cargo.is_on(&shelf));
}

#[test]
fn a_source_that_does_not_open_all_connections_is_given_up() {
    let limit = Duration::from_millis(300);
    let quick = Timing { join: limit, linger: limit, ..timing() };
    let net = Net::new(None);
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let main = net.accept(None).unwrap();
            let options = IncomingOptions { timing: quick, ..IncomingOptions::new(&Unwatched) };
            receive(main, &net, Arc::new(Shelf::default()), Registry::new(), &options)
        });
        let main = net.dial().unwrap();
        let mut writer = main.writer;
        writer.write_all(&Hello::Offer(offer(3, 0)).encode()).unwrap();
        writer.write_all(&Script::main().block(&[vda()]).barrier(1).0).unwrap();
        let error = destination.join().unwrap().unwrap_err();
        assert_eq!(error.blame(), format_spec::Blame::Transport, "{error}");
    });
}

#[derive(Debug, Clone)]
enum Move {
    Disk(u32, u64),
    Zeroes(u32, u64, u64),
    Data(u32, u64, usize),
    Seal(u32),
    Create(u32, u32, u32),
    BitmapSeal(u32, u32),
    Remove(u32, u32),
    Barrier(u64, bool),
    Prepare,
    Commit,
    Keepalive,
}

fn moves() -> impl Strategy<Value = Move> {
    let disk = 0u32..2;
    let leaf = 65536u64;
    prop_oneof![
        (disk.clone(), 0u64..4).prop_map(move |(d, n)| Move::Disk(d, n * leaf)),
        (disk.clone(), 0u64..3, 1u64..4).prop_map(move |(d, at, n)| Move::Zeroes(
            d,
            at * leaf,
            n * leaf
        )),
        (disk.clone(), 0u64..3, 1usize..3).prop_map(move |(d, at, n)| Move::Data(
            d,
            at * leaf,
            n * 65536
        )),
        disk.clone().prop_map(Move::Seal),
        (disk, 0u32..2, 1u32..3).prop_map(|(d, b, g)| Move::Create(d, b, g)),
        (0u32..2, 1u32..3).prop_map(|(b, g)| Move::BitmapSeal(b, g)),
        (0u32..2, 1u32..3).prop_map(|(b, g)| Move::Remove(b, g)),
        (1u64..4, any::<bool>()).prop_map(|(n, d)| Move::Barrier(n, d)),
        Just(Move::Prepare),
        Just(Move::Commit),
        Just(Move::Keepalive),
    ]
}

fn play(moves: &[Move]) -> Script {
    let mut script = Script::main();
    for one in moves {
        let version = |bitmap, generation| BitmapVersion { bitmap, generation };
        let content;
        let record = match one.clone() {
            Move::Disk(d, size) => {
                let name = if d == 0 { "a" } else { "b" };
                BlockRecord::Disk(Disk { disk: DiskId(d), keeps_rest: false, size, name })
            }
            Move::Zeroes(d, at, len) => BlockRecord::Run(Run::zeroes(DiskId(d), at, len)),
            Move::Data(d, at, len) => {
                content = vec![9; len];
                BlockRecord::Run(Run::data(DiskId(d), at, &content))
            }
            Move::Seal(d) => BlockRecord::DiskSeal(DiskSeal { disk: DiskId(d), hash: None }),
            Move::Create(d, bitmap, generation) => BlockRecord::BitmapCreate(BitmapCreate {
                version: version(bitmap, generation),
                disk: DiskId(d),
                shape: BitmapShape::of_disk(2 * 65536, 65536),
                is_enabled: true,
                is_persistent: true,
                name: "x",
            }),
            Move::BitmapSeal(bitmap, generation) => BlockRecord::BitmapSeal(BitmapSeal {
                version: version(bitmap, generation),
                digest: None,
            }),
            Move::Remove(bitmap, generation) => {
                BlockRecord::BitmapRemove(version(bitmap, generation))
            }
            other => {
                script = script.control(&[match other {
                    Move::Barrier(number, is_durable) => Control::Barrier { number, is_durable },
                    Move::Prepare => Control::Prepare(SESSION),
                    Move::Commit => Control::Commit(SESSION),
                    _ => Control::Keepalive,
                }]);
                continue;
            }
        };
        script = script.block(&[record]);
    }
    script
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the order, the destination ends, and publishes only what was introduced, came
    /// whole, was sealed, and was asked for.
    #[test]
    fn any_order_of_records_ends_well(moves in proptest::collection::vec(moves(), 0..14)) {
        let shelf = Arc::new(Shelf::default());
        let net = Net::new(None);
        let received = std::thread::scope(|scope| {
            let destination = scope.spawn(|| {
                let main = net.accept(None).unwrap();
                let options =
                    IncomingOptions { timing: timing(), ..IncomingOptions::new(&Unwatched) };
                receive(main, &net, shelf.clone(), Registry::new(), &options)
            });
            let main = net.dial().unwrap();
            let mut writer = main.writer;
            let _ = writer.write_all(&Hello::Offer(offer(1, 0)).encode());
            let _ = writer.write_all(&play(&moves).0);
            main.line.hang_up();
            destination.join().unwrap()
        });
        let state = shelf.0.lock().unwrap();
        prop_assert_eq!(received.is_ok(), state.is_committed);
        if state.is_committed {
            let last = |wanted: fn(&Move) -> bool| moves.iter().position(wanted);
            let prepare = last(|m| matches!(m, Move::Prepare));
            let commit = last(|m| matches!(m, Move::Commit));
            prop_assert!(prepare.is_some() && prepare < commit, "{:?}", moves);
            let disks = moves.iter().filter(|m| matches!(m, Move::Disk(..))).count();
            let seals = moves.iter().filter(|m| matches!(m, Move::Seal(..))).count();
            prop_assert!(seals >= disks);
        }
    }
}
