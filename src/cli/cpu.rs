//! `vmm cpu`: this host's CPU model, and what the models of several hosts have in common.

use std::path::{Path, PathBuf};

use super::args::{Arg, Args, Stop, usage, utf8};
use super::{Error, Outcome, print};
use crate::arch::cpu_model::{Model, ModelError};
use crate::arch::cpuid;
use crate::kvm::open_kvm;
use crate::machine::MachineError;

/// The help of `vmm cpu`.
pub const HELP: &str = "\
usage: vmm cpu
       vmm cpu --common A B...

Prints a CPU model as JSON: the features that this host's CPU and KVM offer a guest, and the bits of its physical
addresses; or with --common what the models in files A, B and so on all have. A VM that runs with such a model
(vmm run --cpu-model FILE) can move between all of these hosts, if they are of one vendor and their TSCs run
alike or scale.

example: vmm cpu > a.json           (on each host)
         vmm cpu --common a.json b.json > common.json
";

/// `vmm cpu`
///
/// # Errors
/// Wrong usage.
pub fn command(mut args: Args) -> Result<Outcome, Stop> {
    let (mut common, mut files) = (false, Vec::new());
    while let Some(arg) = args.next_arg()? {
        match arg {
            Arg::Option(name) if name == "common" => common = true,
            Arg::Option(name) => return Err(args.unknown(&name)),
            Arg::Operand(operand) => files.push(PathBuf::from(utf8(operand, "model")?)),
        }
    }
    match (common, files.as_slice()) {
        (false, []) => Ok(host()),
        (false, [file, ..]) => {
            Err(usage(format!("unexpected '{}': files go with --common", file.display())))
        }
        (true, [first, others @ ..]) if !others.is_empty() => Ok(shared(first, others)),
        (true, _) => Err(usage("--common needs at least two models' files")),
    }
}

fn host() -> Outcome {
    let kvm = open_kvm().map_err(Error::Machine)?;
    let cpuid = cpuid::host_cpuid(&kvm).map_err(MachineError::kvm("read its CPUID"))?;
    print(&Model::of_host(&cpuid).to_json())
}

fn shared(first: &Path, others: &[PathBuf]) -> Outcome {
    let mut model = Model::load(first)?;
    for file in others {
        model = Model::common(&model, &Model::load(file)?);
    }
    print(&model.to_json())
}

impl From<ModelError> for Error {
    fn from(error: ModelError) -> Self {
        MachineError::from(error).into()
    }
}
