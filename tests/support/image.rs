//! The image of a disk that a guest's program wrote to (load.rs), looked at from outside when the guest has ended.

use std::path::Path;
use std::process::Command;

use crate::load::{BLOCK_LEN, block};

/// Its file system is clean, and every block that it wrote is there.
pub fn check_image(image: &Path, blocks: u64) {
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).arg(image).output();
        let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
        output.stdout
    };
    run("e2fsck", &["-f", "-n"]);
    let file = run("debugfs", &["-R", "cat /blocks"]);
    assert_eq!(file.len() as u64, blocks * BLOCK_LEN as u64);
    for (number, found) in (0..).zip(file.chunks(BLOCK_LEN)) {
        assert!(
            found == block(number, BLOCK_LEN),
            "block {number} of the image isn't what was written"
        );
    }
}
