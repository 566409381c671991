//! The options that say what differs on this host, for a guest that was started on another.

use std::str::FromStr;

use super::args::{Args, Keys, Stop, absolute, split_list, usage};
use super::run_args::parse_serial;
use crate::config::{NAME_BYTES_MAX, SerialTarget, VM_NAME, check_name};
use crate::migrate::arriving::Overrides;

/// The options as given.
#[derive(Default)]
pub struct Here {
    name: Option<String>,
    control: Option<String>,
    serial: Option<String>,
    disks: Vec<String>,
    nets: Vec<String>,
}

impl Here {
    /// Takes an option if it is one of these; false if it isn't.
    ///
    /// # Errors
    /// Wrong usage.
    pub fn option(&mut self, args: &mut Args, name: &str) -> Result<bool, Stop> {
        match name {
            "name" => args.text_once(name, &mut self.name)?,
            "control" => args.text_once(name, &mut self.control)?,
            "serial" => args.text_once(name, &mut self.serial)?,
            "disk" => self.disks.push(args.text(name)?),
            "net" => self.nets.push(args.text(name)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The options again, for the process of each guest that one listener takes.
    ///
    /// # Errors
    /// Wrong usage: what can be one guest's only.
    pub fn for_each_guest(self) -> Result<Vec<String>, Stop> {
        let only = [("name", &self.name), ("control", &self.control)];
        if let Some((option, _)) = only.iter().find(|(_, given)| given.is_some()) {
            return Err(usage(format!("--{option} is for one guest, and --keep takes many")));
        }
        let serial = self.serial.unwrap_or_else(|| "null".to_owned());
        let for_one = |what: &str| {
            usage(format!("--serial '{serial}' is for one guest, and --keep takes many: {what}"))
        };
        match parse_serial(&serial)? {
            SerialTarget::Null => {}
            SerialTarget::Stdio => return Err(for_one("take null, file: or unix:")),
            target if target.is_per_vm() => {}
            _ => return Err(for_one(&format!("put {VM_NAME} into the path"))),
        }
        let mut options = vec!["--serial".to_owned(), serial.clone()];
        for (option, values) in [("--disk", &self.disks), ("--net", &self.nets)] {
            options.extend(values.iter().flat_map(|value| [option.to_owned(), value.clone()]));
        }
        // What is wrong is told now, not when the first guest comes.
        Self { serial: Some(serial), ..self }.overrides().map(|_| options)
    }

    /// What they say.
    ///
    /// # Errors
    /// Wrong usage.
    pub fn overrides(self) -> Result<Overrides, Stop> {
        if let Some(name) = &self.name {
            check_name("--name", name, NAME_BYTES_MAX).map_err(|e| usage(e.to_string()))?;
        }
        let mut overrides = Overrides {
            name: self.name,
            control: self.control.map(|path| absolute("--control", &path)).transpose()?,
            serial: self.serial.as_deref().map(parse_serial).transpose()?,
            ..Overrides::default()
        };
        for text in &self.disks {
            let (id, path) = pair("disk", text, "path=PATH")?;
            once("--disk", &id, &overrides.disks)?;
            overrides.disks.push((id, absolute("--disk", &path)?));
        }
        for text in &self.nets {
            let (id, tap) = pair("net", text, "tap=NAME")?;
            once("--net", &id, &overrides.nets)?;
            overrides.nets.push((id, tap));
        }
        Ok(overrides)
    }
}

/// `id=ID,KEY=VALUE`
fn pair(option: &'static str, text: &str, key: &'static str) -> Result<(String, String), Stop> {
    let name = key.split('=').next().unwrap_or(key);
    let keys = Keys::new(option, &split_list(text), &["id=ID", key])?;
    let need = |key: &str| usage(format!("--{option} '{text}': {key}= is needed"));
    let id = keys.value("id", String::from_str)?.ok_or_else(|| need("id"))?;
    let value = keys.value(name, String::from_str)?.ok_or_else(|| need(name))?;
    Ok((id, value))
}

/// Refuses a device that was given before.
fn once<T>(option: &str, id: &str, given: &[(String, T)]) -> Result<(), Stop> {
    match given.iter().any(|(other, _)| other == id) {
        true => Err(usage(format!("{option} id={id} is given twice"))),
        false => Ok(()),
    }
}
