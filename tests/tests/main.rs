//! Everything that crosses a network, with the programs as they are shipped: one file for each part. One program
//! for all of them: each one more would be linked with everything once more.

mod bad_input;
mod browser;
mod canaries;
mod doctor;
mod events;
mod flood;
mod http;
mod identity;
mod lab;
mod matrix;
mod narrow;
mod nats;
mod opening;
mod pages;
mod pages_speed;
mod rdp;
mod redirect;
mod ssh;
mod startup;
mod streams;
mod tiers;
mod udp;

fn main() -> std::process::ExitCode {
    let tests = [
        bad_input::tests(),
        browser::tests(),
        canaries::tests(),
        doctor::tests(),
        events::tests(),
        flood::tests(),
        http::tests(),
        identity::tests(),
        lab::tests(),
        matrix::tests(),
        narrow::tests(),
        nats::tests(),
        opening::tests(),
        pages::tests(),
        pages_speed::tests(),
        rdp::tests(),
        redirect::tests(),
        ssh::tests(),
        startup::tests(),
        streams::tests(),
        tiers::tests(),
        udp::tests(),
    ];
    adit_tests::harness::run(tests.into_iter().flatten().collect())
}
