//! The tree's own rules that neither the compiler nor clippy holds: files that say what they are for and
//! fit a few screens, `unsafe` where it is known to be, and documents that name what there is.

use std::fs;
use std::path::Path;

/// Lines of a file.
const LINES_MAX: usize = 400;

/// Every file with `unsafe` in it, and how often at most. One more is a decision: make it here too.
const UNSAFE_MAX: &[(&str, usize)] = &[
    ("src/api/socket.rs", 1),
    ("src/arch/x86_64/vcpu_ioctl.rs", 5),
    ("src/arch/x86_64/vcpu_state.rs", 1),
    ("src/backend/disk.rs", 1),
    ("src/backend/iovec.rs", 4),
    ("src/backend/lock.rs", 2),
    ("src/backend/tap.rs", 4),
    ("src/background.rs", 1),
    ("src/console/terminal.rs", 7),
    ("src/dirty.rs", 1),
    ("src/kick.rs", 7),
    ("src/memory.rs", 2),
    ("src/migrate/arriving.rs", 1),
    ("src/signals.rs", 3),
    ("src/stats.rs", 2),
    ("tests/bench/src/ring.rs", 2),
    ("tests/support/guests.rs", 2),
];

/// Whether a word is forbidden in the file of this path.
type IsForbidden = fn(&str) -> bool;

/// The text of a file of the tree.
fn read(path: &str) -> String {
    let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&whole).unwrap_or_else(|e| panic!("{}: {e}", whole.display()))
}

/// Path and text of every Rust file but this one, whose strings are what it looks for.
fn sources() -> Vec<(String, String)> {
    let mut paths = Vec::new();
    for dir in ["src", "devices", "migration", "tests"] {
        collect(dir, &mut paths);
    }
    assert!(paths.len() > 100, "the tree is not here: {} files", paths.len());
    paths.into_iter().map(|path| (path.clone(), read(&path))).collect()
}

fn collect(dir: &str, paths: &mut Vec<String>) {
    let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(dir));
    for entry in entries.unwrap_or_else(|e| panic!("{dir}: {e}")) {
        let entry = entry.expect("a directory's entry");
        let name = entry.file_name().into_string().expect("UTF-8");
        let path = format!("{dir}/{name}");
        if entry.file_type().expect("its type").is_dir() {
            if name != "target" {
                collect(&path, paths);
            }
        } else if name.ends_with(".rs") && path != "tests/tidy.rs" {
            paths.push(path);
        }
    }
}

/// Lines of code: comments are taken off, strings stay.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(|line| line.split("//").next().unwrap_or_default())
}

fn is_test(path: &str) -> bool {
    path.ends_with("_tests.rs")
        || path.starts_with("tests/")
        || ["/testing/", "/testing.rs", "/tests/"].iter().any(|part| path.contains(part))
}

/// Fails with one line for each of them.
#[track_caller]
fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn files_say_what_they_are_for_and_stay_short() {
    let mut found = Vec::new();
    for (path, text) in sources() {
        if !text.starts_with("//! ") && !text.starts_with("#![doc = include_str!") {
            found.push(format!("{path} doesn't open with //!"));
        }
        let lines = text.lines().count();
        if lines > LINES_MAX {
            found.push(format!("{path} has {lines} lines, over {LINES_MAX}"));
        }
    }
    none("files", &found);
}

#[test]
fn unsafe_is_where_it_is_known_to_be() {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let sources = sources();
    for (path, text) in &sources {
        let words = code(text).flat_map(|line| line.split(|c| !is_word(c)));
        let count = words.filter(|word| *word == "unsafe").count();
        let most = UNSAFE_MAX.iter().find(|(known, _)| known == path).map_or(0, |(_, most)| *most);
        if count > most {
            found.push(format!("{path}: {count}, of at most {most}"));
        }
        if count == 0 && most > 0 {
            found.push(format!("{path}: none left: take it off the list"));
        }
    }
    for (known, _) in UNSAFE_MAX {
        if !sources.iter().any(|(path, _)| path == known) {
            found.push(format!("{known}: no such file"));
        }
    }
    none("unsafe", &found);
    for lib in ["devices/src/lib.rs", "migration/src/lib.rs"] {
        assert!(read(lib).contains("#![forbid(unsafe_code)]"), "{lib} allows unsafe");
    }
}

#[test]
fn words_are_where_they_belong() {
    let anywhere = |_: &str| true;
    // A word, and where it may not be.
    let rules: [(&str, IsForbidden); 6] = [
        ("target_arch", |path| path != "src/arch/mod.rs"),
        // A machine's parts are lent by value; what threads share is atomic, or a bus slot.
        ("Arc<Mutex", |path| !is_test(path)),
        ("Arc<RwLock", anywhere),
        // The one that is is another process of the test beside it.
        ("#[ignore", |path| path != "src/backend/lock_tests.rs"),
        ("todo!", anywhere),
        ("unimplemented!", anywhere),
    ];
    let mut found = Vec::new();
    for (path, text) in sources() {
        for (word, forbidden) in &rules {
            if forbidden(&path) && code(&text).any(|line| line.contains(word)) {
                found.push(format!("{path}: {word}"));
            }
        }
        for mark in ["FIXME", "XXX", "TODO"] {
            if text.contains(mark) {
                found.push(format!("{path}: {mark}"));
            }
        }
    }
    none("words out of place", &found);
}

#[test]
fn the_readme_names_every_module() {
    let readme = read("README.md");
    let mut found = Vec::new();
    for (lib, dir) in [
        ("src/lib.rs", "src"),
        ("devices/src/lib.rs", "devices"),
        ("migration/src/lib.rs", "migration"),
    ] {
        let text = read(lib);
        let modules = text.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';'));
        for module in modules {
            if !readme.contains(&format!("`{module}`")) && !readme.contains(&format!("`{module}/`"))
            {
                found.push(format!("{dir}: {module}"));
            }
        }
    }
    none("modules that README.md doesn't name", &found);
}

#[test]
fn the_readme_lists_every_invariant() {
    let readme = read("README.md");
    let (_, list) = readme.split_once("### Invariants").expect("README.md has a list of them");
    let list = list.split("\n#").next().unwrap_or_default();
    let mut found = Vec::new();
    let mut kept = 0;
    for (path, text) in sources() {
        let count = text.matches("Invariant:").count();
        let listed = list.matches(&format!("(`{path}`)")).count();
        kept += count;
        if count != listed {
            found.push(format!("{path} has {count}, README.md lists {listed}"));
        }
    }
    none("invariants", &found);
    assert_eq!(
        list.matches("\n- ").count(),
        kept,
        "README.md lists one of a file that isn't there"
    );
}

/// A destination that doesn't say so gets version 1, and what only a later one holds is lost without a word.
#[test]
fn every_later_version_of_a_section_is_told_to_sources() {
    let told = read("src/migrate/incoming.rs");
    let (mut found, mut later) = (Vec::new(), 0);
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        for part in text.split("impl Stateful for ").skip(1) {
            let name = part.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            let version = part.split_once("const VERSION: u16 = ").expect("it has one").1;
            if version.starts_with("1;") {
                continue;
            }
            later += 1;
            if !told.contains(&format!("({name}::KIND.to_owned(), {name}::VERSION)")) {
                found.push(format!("{path}: {name}"));
            }
        }
    }
    none("sections not in reads()", &found);
    assert!(later > 0, "none was looked at");
}

#[test]
fn documents_name_what_exists() {
    let readme = read("README.md");
    let makefile = read("Makefile");
    let mut found = Vec::new();
    for text in readme.split("make ").skip(1) {
        let target: String =
            text.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
        // In prose the word is followed by no target; a command stands in a code span or block.
        if text.starts_with(&format!("{target}`")) && !makefile.contains(&format!("\n{target}:")) {
            found.push(format!("README.md: make {target}"));
        }
    }
    for link in readme.split("](").skip(1).filter_map(|text| text.split(')').next()) {
        let there = Path::new(env!("CARGO_MANIFEST_DIR")).join(link).exists();
        // Where the tests run in the emulated host, only what they need is with them.
        if link.starts_with(['s', 'm', 'd', 't']) && !there {
            found.push(format!("README.md: {link}"));
        }
    }
    none("documents name what isn't there", &found);
    for command in ["make run", "make test"] {
        let at = readme.find(command).unwrap_or(usize::MAX);
        assert!(at < 1000, "README.md doesn't open with {command}");
    }
}

#[test]
fn the_api_documents_every_field_of_a_report() {
    let api = read("src/api/API.md");
    let report = read("migration/src/report.rs");
    let fields: Vec<_> = report
        .lines()
        .filter_map(|line| line.strip_prefix("    pub ")?.split_once(':').map(|(name, _)| name))
        .collect();
    assert!(fields.len() > 40, "report.rs has changed its shape: {fields:?}");
    let missing: Vec<_> = fields
        .into_iter()
        .filter(|field| !api.contains(&format!("`{field}`")))
        .map(str::to_owned)
        .collect();
    none("fields that src/api/API.md doesn't name", &missing);
    // Of `vmm inspect --json`: the keys of its literals.
    let inspect = read("src/cli/inspect.rs");
    let code = inspect.split("#[cfg(test)]").next().unwrap_or_default();
    let keys = code.split("\":").filter_map(|before| before.rsplit_once('"').map(|(_, key)| key));
    let keys: Vec<_> =
        keys.filter(|key| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')).collect();
    assert!(keys.len() > 20, "inspect.rs has changed its shape: {keys:?}");
    let missing = keys.into_iter().filter(|key| !api.contains(&format!("`{key}`")));
    none("keys that src/api/API.md doesn't name", &missing.map(str::to_owned).collect::<Vec<_>>());
}

/// The words that a document has in backquotes, one by one.
fn words_of(document: &str) -> std::collections::BTreeSet<&str> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let quoted = document.split('`').skip(1).step_by(2);
    quoted.flat_map(|text| text.split(|c| !is_word(c))).collect()
}

/// Kinds of sections, the fields of each frozen state, and those of the configuration.
#[test]
fn the_protocol_names_every_section_and_field() {
    let protocol = read("migration/PROTOCOL.md");
    let words = words_of(&protocol);
    let (mut kinds, mut fields) = (Vec::new(), Vec::new());
    for (path, text) in sources().into_iter().filter(|(path, _)| !is_test(path)) {
        if path.starts_with("migration/src/testing") {
            continue;
        }
        let mut is_frozen = false;
        for line in text.split("#[cfg(test)]").next().unwrap_or_default().lines() {
            if let Some((_, kind)) = line.split_once("const KIND: &").filter(|_| line.contains('"'))
            {
                kinds.push(kind.split('"').nth(1).unwrap_or_default().to_owned());
            }
            let name = line.trim_start_matches("pub ").strip_prefix("struct ");
            let name = name.map(|rest| rest.split([' ', ';', '<']).next().unwrap_or_default());
            let version = name.and_then(|name| name.rsplit_once('V')).map(|(_, version)| version);
            if name.is_some() || line.starts_with('}') {
                is_frozen =
                    version.is_some_and(|v| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit()));
            }
            let field = line.strip_prefix("    ").map(|field| field.trim_start_matches("pub "));
            let field = field.and_then(|field| field.split_once(": ")).map(|(field, _)| field);
            fields
                .extend(field.filter(|f| is_frozen && !f.contains(['/', ' '])).map(str::to_owned));
        }
    }
    assert!(
        kinds.len() >= 10 && fields.len() > 60,
        "the code has changed its shape: {kinds:?} {fields:?}"
    );
    let missing = kinds.into_iter().chain(fields).filter(|word| !words.contains(word.as_str()));
    none("names that migration/PROTOCOL.md lacks", &missing.collect::<Vec<_>>());
}
