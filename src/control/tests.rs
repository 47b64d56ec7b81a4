use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::*;
use crate::status::{Migration, Status};

fn say(line: &str, migration: &Migration) -> Value {
    serde_json::from_str(&commands::answer(line.as_bytes(), migration)).unwrap()
}

#[test]
fn commands_are_answered_and_mistakes_named() {
    let migration = Migration::default();
    migration.enter(Status::Active);
    let info = say(r#"{"execute": "query-migrate", "id": [1]}"#, &migration);
    assert_eq!((&info["return"]["status"], &info["id"]), (&json!("active"), &json!([1])));
    let set = r#"{"execute": "migrate-set-parameters",
        "arguments": {"max-bandwidth": 5, "downtime-limit": 7}}"#;
    assert_eq!(say(set, &migration), json!({ "return": {} }));
    let parameters = say(r#"{"execute": "query-migrate-parameters"}"#, &migration);
    assert_eq!(parameters["return"], json!({ "max-bandwidth": 5, "downtime-limit": 7 }));
    for (line, class) in [
        ("", "GenericError"),
        ("[]", "GenericError"),
        ("{}", "GenericError"),
        (r#"{"execute": 3}"#, "GenericError"),
        (r#"{"execute": "query-migrate", "x": 1}"#, "GenericError"),
        (r#"{"execute": "query-migrate", "arguments": 1}"#, "GenericError"),
        (r#"{"execute": "query-migrate", "arguments": {"x": 1}}"#, "GenericError"),
        (r#"{"execute": "dance"}"#, "CommandNotFound"),
        (r#"{"execute": "dance", "arguments": {"x": 1}}"#, "CommandNotFound"),
        (r#"{"execute": "migrate-start-postcopy"}"#, "GenericError"),
        (r#"{"execute": "migrate-recover", "arguments": {"uri": 1}}"#, "GenericError"),
        (r#"{"execute": "migrate-recover", "arguments": {"uri": "tcp:a:1"}}"#, "GenericError"),
    ] {
        let answer = say(line, &migration);
        assert_eq!(answer["error"]["class"], class, "{line}");
        assert!(answer["error"]["desc"].as_str().is_some_and(|desc| desc.len() > 10), "{line}");
    }
    for value in ["-1", "1.5", "\"5\"", "null", "2000001", "18446744073709551616"] {
        let line = format!(
            r#"{{"execute": "migrate-set-parameters", "arguments": {{"downtime-limit": {value}}}}}"#
        );
        assert_eq!(say(&line, &migration)["error"]["class"], "GenericError", "{value}");
    }
    assert_eq!(migration.parameters().downtime_limit, 7);
    assert_eq!(say(r#"{"execute": "migrate-cancel"}"#, &migration), json!({ "return": {} }));
    assert!(migration.is_cancelled());
}

#[test]
fn a_client_asks_a_server_and_hears_its_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let server = Server::start(&path, Arc::new(Migration::default())).unwrap();
    assert!(Server::start(&path, Arc::new(Migration::default())).is_err());
    assert_eq!(ask(&path, "query-migrate", Map::new()).unwrap()["status"], "none");
    let arguments = Map::from_iter([("max-bandwidth".to_owned(), value_of("1000"))]);
    ask(&path, "migrate-set-parameters", arguments).unwrap();
    let error = ask(&path, "dance", Map::new()).unwrap_err();
    assert_eq!(error.exit_status(), 4);
    assert!(error.to_string().contains("dance"), "{error}");
    drop(server);
    assert!(!path.exists());
    assert_eq!(ask(&path, "query-migrate", Map::new()).unwrap_err().exit_status(), 3);
    // What a killed server leaves behind is replaced, a file of somebody is not.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    drop(Server::start(&path, Arc::new(Migration::default())).unwrap());
    std::fs::write(&path, "mine").unwrap();
    assert!(Server::start(&path, Arc::new(Migration::default())).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn lines_and_connections_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let _server = Server::start(&path, Arc::new(Migration::default())).unwrap();
    let connect = || {
        let stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    };
    let mut endless = connect();
    let line = vec![b' '; MAX_LINE + 5000];
    let _ = endless.write_all(&line);
    let mut said = String::new();
    let _ = endless.read_to_string(&mut said);
    assert!(said.contains("at most"), "{said}");
    // Two commands in one write, and a last one in pieces.
    let mut stream = connect();
    stream.write_all(b"{\"execute\":\"query-migrate\"}\n\n{\"execute\":\"x\"}\n{\"exe").unwrap();
    std::thread::sleep(Duration::from_millis(120));
    stream.write_all(b"cute\":\"query-migrate\"}\n").unwrap();
    let mut lines = BufReader::new(&stream).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert!(next().contains("return") && next().contains("error") && next().contains("return"));
    let idle: Vec<_> = (0..MAX_CONNECTIONS - 1).map(|_| connect()).collect();
    let mut refused = String::new();
    // Those before have been accepted once this one is answered.
    connect().read_to_string(&mut refused).unwrap();
    assert!(refused.contains("connections"), "{refused}");
    drop(idle);
}
