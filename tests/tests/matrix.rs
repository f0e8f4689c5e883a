//! Every kind of network against every other, once, and three times where it takes luck.
//! `target/release/lab matrix --rounds 20` does it twenty times, which is what `tests/MATRIX.md` shows.

use adit_tests::lab::NatKind;
use adit_tests::lab_tests;
use adit_tests::matrix::{Expected, KINDS, Matrix, behind_one_router, expected, one_router_table, tables};
use anyhow::ensure;

lab_tests!(every_pair_reaches_the_tier_that_it_can);

async fn every_pair_reaches_the_tier_that_it_can() -> anyhow::Result<()> {
    let matrix = Matrix::up(&KINDS).await?;
    let is_rejecting = |agent, technician| [agent, technician].contains(&NatKind::Rejecting);
    let times = |agent, technician| match expected(agent, technician) {
        Expected::Likely => 3,
        Expected::Direct if is_rejecting(agent, technician) => 3,
        _ => 1,
    };
    let (cells, mut wrong) = matrix.measure(4, times).await;
    println!("{}", tables(matrix.kinds(), &cells));
    matrix.ports_given_back().await?;
    drop(matrix);
    for ((agent, technician), runs) in &cells {
        let (agent, technician) = (KINDS[*agent], KINDS[*technician]);
        let direct = runs.iter().filter(|run| run.direct.is_some()).count();
        let fine = match expected(agent, technician) {
            Expected::Direct if is_rejecting(agent, technician) => direct > 1,
            Expected::Direct => direct == runs.len(),
            Expected::Likely => direct > 0,
            Expected::Relay => direct == 0,
        };
        if !fine {
            wrong.push(format!("agent {agent}, technician {technician}: {direct} of {} direct", runs.len()));
        }
    }
    let neighbours = behind_one_router(1).await?;
    println!("{}", one_router_table(&neighbours));
    for (neighbours, expected, runs) in &neighbours {
        let is_direct = runs.iter().all(|run| run.direct.is_some());
        if is_direct != (*expected == Expected::Direct) {
            wrong.push(format!("behind one router, {neighbours:?}: {runs:?}"));
        }
    }
    ensure!(cells.len() == KINDS.len() * KINDS.len());
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}
