//! Stops a build whose wheel would lack the command line: `pyrformer/cli` is a symbolic link to `cli`, and git writes a
//! small text file in its place where links are switched off.

use std::path::Path;

fn main() {
    // Asked at run time: checkouts that share a target folder share the compiled script.
    let Ok(here) = std::env::var("CARGO_MANIFEST_DIR") else { return };
    let file = Path::new(&here).join("../../pyrformer/cli/__init__.py");
    println!("cargo::rerun-if-changed={}", file.display());
    if !file.is_file() {
        println!(
            "cargo::error=[build] pyrformer/cli is not a link to ../cli: run `git config core.symlinks true`, then \
             `git checkout -- pyrformer/cli` (on Windows, switch on developer mode first)"
        );
    }
}
