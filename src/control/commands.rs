//! The commands: a line in, a line out.

use serde_json::{Map, Value, json};

use super::MAX_DOWNTIME_MS;
use crate::status::{Migration, Parameters};

/// What can be controlled. What a migration cannot do it refuses.
pub trait Controlled: Send + Sync {
    /// The migration.
    fn migration(&self) -> &Migration;

    /// Whether its parameters can be changed on this side.
    fn may_change(&self) -> Result<(), Refused> {
        Ok(())
    }

    /// The parameters were changed.
    fn parameters_changed(&self) {}

    /// It was called off; see [`Migration::is_cancelled`].
    fn cancelled(&self) {}

    /// `migrate-start-postcopy`.
    fn start_postcopy(&self) -> Result<(), Refused> {
        Err(Refused("postcopy is not enabled for this migration".to_owned()))
    }

    /// `migrate-recover`, with the URI to go on at.
    fn recover(&self, _uri: &str) -> Result<(), Refused> {
        Err(Refused("the migration is not in the state postcopy-paused".to_owned()))
    }

    /// `migrate-pause`.
    fn pause(&self) -> Result<(), Refused> {
        Err(Refused("only a migration in postcopy can be paused".to_owned()))
    }

    /// `migrate-continue`, with the status that it is to leave.
    fn go_on(&self, _from: &str) -> Result<(), Refused> {
        Err(Refused("the migration is not waiting before its switchover".to_owned()))
    }
}

impl Controlled for Migration {
    fn migration(&self) -> &Migration {
        self
    }
}

/// Why a command was not carried out, for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused(pub String);

/// What becomes an `error` of the answer.
struct Failure {
    class: &'static str,
    desc: String,
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Self { class: "GenericError", desc: refused.0 }
    }
}

fn generic(desc: impl Into<String>) -> Failure {
    Failure { class: "GenericError", desc: desc.into() }
}

/// Carries out one line and makes the answer, without the line's end.
pub(super) fn answer(line: &[u8], controlled: &dyn Controlled) -> String {
    let request: Option<Map<String, Value>> = serde_json::from_slice(line).ok();
    let id = request.as_ref().and_then(|request| request.get("id")).cloned();
    let mut answer = match request.map_or_else(|| Err(not_an_object()), |r| run(&r, controlled)) {
        Ok(value) => json!({ "return": value }),
        Err(failure) => json!({ "error": { "class": failure.class, "desc": failure.desc } }),
    };
    if let (Some(id), Some(answer)) = (id, answer.as_object_mut()) {
        answer.insert("id".to_owned(), id);
    }
    answer.to_string()
}

/// The answer to a line that is not read to its end.
pub(super) fn too_long() -> String {
    let desc = format!("a command has at most {} bytes", super::MAX_LINE);
    json!({ "error": { "class": "GenericError", "desc": desc } }).to_string()
}

/// The answer to one connection too many.
pub(super) fn too_many() -> String {
    let desc = format!("there are {} connections already", super::MAX_CONNECTIONS);
    json!({ "error": { "class": "GenericError", "desc": desc } }).to_string()
}

fn not_an_object() -> Failure {
    generic("a command is one JSON object on one line, like {\"execute\": \"query-migrate\"}")
}

fn run(request: &Map<String, Value>, controlled: &dyn Controlled) -> Result<Value, Failure> {
    if let Some(key) = request.keys().find(|k| !["execute", "arguments", "id"].contains(&&***k)) {
        return Err(generic(format!("{key:?} is no member of a command")));
    }
    let Some(Value::String(command)) = request.get("execute") else {
        return Err(generic("\"execute\" must be there and name a command"));
    };
    let empty = Map::new();
    let arguments = match request.get("arguments") {
        None => &empty,
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(generic("\"arguments\" must be an object")),
    };
    let migration = controlled.migration();
    let known: &[&str] = match command.as_str() {
        "migrate-set-parameters" => &["max-bandwidth", "downtime-limit"],
        "migrate-recover" => &["uri"],
        "migrate-continue" => &["state"],
        "qmp_capabilities" => &["enable"],
        _ => &[],
    };
    if let Some(key) = arguments.keys().find(|key| !known.contains(&key.as_str())) {
        return match command.as_str() {
            name if COMMANDS.contains(&name) => {
                Err(generic(format!("{command} has no argument {key:?} here")))
            }
            _ => Err(unknown(command)),
        };
    }
    match command.as_str() {
        "qmp_capabilities" => {}
        "query-commands" => {
            return Ok(COMMANDS.iter().map(|name| json!({ "name": name })).collect());
        }
        "query-migrate" => return to_value(&migration.info()),
        "query-migrate-parameters" => return to_value(&migration.parameters()),
        "migrate-set-parameters" => {
            let mut parameters = migration.parameters();
            set(arguments, &mut parameters)?;
            controlled.may_change()?;
            migration.set_parameters(parameters);
            controlled.parameters_changed();
        }
        // As in QEMU: not an error when there is nothing to cancel.
        "migrate-cancel" => {
            if migration.cancel() {
                controlled.cancelled();
            }
        }
        "migrate-start-postcopy" => controlled.start_postcopy()?,
        "migrate-pause" => controlled.pause()?,
        "migrate-recover" => controlled.recover(text(arguments, "uri")?)?,
        "migrate-continue" => controlled.go_on(text(arguments, "state")?)?,
        _ => return Err(unknown(command)),
    }
    Ok(json!({}))
}

const COMMANDS: &[&str] = &[
    "migrate-cancel",
    "migrate-continue",
    "migrate-pause",
    "migrate-recover",
    "migrate-set-parameters",
    "migrate-start-postcopy",
    "qmp_capabilities",
    "query-commands",
    "query-migrate",
    "query-migrate-parameters",
];

fn unknown(command: &str) -> Failure {
    let desc = format!("there is no command {command:?}; query-commands lists them");
    Failure { class: "CommandNotFound", desc }
}

fn set(arguments: &Map<String, Value>, parameters: &mut Parameters) -> Result<(), Failure> {
    for (key, value) in arguments {
        let number = value.as_u64().ok_or_else(|| {
            generic(format!("{key} must be a whole number of at least 0, not {value}"))
        })?;
        match key.as_str() {
            "max-bandwidth" => parameters.max_bandwidth = number,
            _ if number > MAX_DOWNTIME_MS => {
                return Err(generic(format!("{key} is at most {MAX_DOWNTIME_MS} milliseconds")));
            }
            _ => parameters.downtime_limit = number,
        }
    }
    Ok(())
}

fn text<'a>(arguments: &'a Map<String, Value>, key: &str) -> Result<&'a str, Failure> {
    let found = arguments.get(key).and_then(Value::as_str);
    found.ok_or_else(|| generic(format!("the argument {key:?} is missing or not a string")))
}

fn to_value(value: &impl serde::Serialize) -> Result<Value, Failure> {
    serde_json::to_value(value).map_err(|error| generic(error.to_string()))
}
