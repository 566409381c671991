//! How much memory this process's control groups leave it: it may be less than the host has, and who takes more is killed.

use std::fs;
use std::path::Path;

/// The files of one version of control groups: limit, use, and in `memory.stat` what of it can be dropped.
struct Files {
    limit: &'static str,
    used: &'static str,
    caches: [&'static str; 2],
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    caches: ["total_inactive_file ", "total_active_file "],
};
const V2: Files = Files {
    limit: "memory.max",
    used: "memory.current",
    caches: ["inactive_file ", "active_file "],
};

/// Bytes that can still be had. `None`: there is no limit, or it can't be told.
pub(super) fn left_bytes() -> Option<u64> {
    left(Path::new("/sys/fs/cgroup"), &fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// `groups`: lines of `number:controllers:path`, without controllers for version 2.
fn left(root: &Path, groups: &str) -> Option<u64> {
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (top, files) = match controllers {
            "" => (root.to_owned(), V2),
            _ if controllers.split(',').any(|name| name == "memory") => (root.join("memory"), V1),
            _ => return None,
        };
        // A group's limit is over all that are in it.
        let groups = Path::new(path.trim_start_matches('/')).ancestors();
        groups.filter_map(|group| files.left(&top.join(group))).min()
    };
    groups.lines().filter_map(of_line).min()
}

impl Files {
    fn left(&self, group: &Path) -> Option<u64> {
        let read = |name| fs::read_to_string(group.join(name)).ok();
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let (limit, used) = (number(&read(self.limit)?)?, number(&read(self.used)?)?);
        let stat = read("memory.stat").unwrap_or_default();
        let caches = stat.lines().filter_map(|line| {
            self.caches.iter().find_map(|name| number(line.strip_prefix(name)?))
        });
        Some(limit.saturating_sub(used).saturating_add(caches.sum()).min(limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, files: [(&str, &str); 3]) {
        fs::create_dir_all(dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_group_counts_in_either_version() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let stat = "anon 7\ninactive_file 100\nactive_file 20\nfile 3\n";
        let names = ["memory.max", "memory.current", "memory.stat"];
        let v2 = |dir: &str, [limit, used]: [&str; 2]| {
            write(&root.join(dir), [(names[0], limit), (names[1], used), (names[2], stat)]);
        };
        v2("a/b", ["max\n", "600\n"]);
        assert_eq!(left(root, "0::/a/b\n"), None, "nothing limits it");
        v2("a", ["1000\n", "700\n"]);
        assert_eq!(left(root, "0::/a/b\n"), Some(420));
        v2("a/b", ["800\n", "600\n"]);
        assert_eq!(left(root, "0::/a/b\n"), Some(320));
        v2("a/b", ["800\n", "900\n"]);
        assert_eq!(left(root, "0::/a/b\n"), Some(120));
        assert_eq!(left(root, "0::/\n1:cpu,cpuacct:/a\n"), None);
        let names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"];
        let stat = "inactive_file 1\ntotal_inactive_file 5\ntotal_active_file 6\n";
        let files = [(names[0], "50\n"), (names[1], "30\n"), (names[2], stat)];
        write(&root.join("memory/c"), files);
        assert_eq!(left(root, "0::/a/b\n4:memory:/c\n"), Some(31));
        assert_eq!(left(root, "what's this\n"), None);
        // Whatever this one is in.
        assert!(left_bytes().is_none_or(|left| left > 0));
    }
}
