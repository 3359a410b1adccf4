// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {IFederation} from "./interfaces/IFederation.sol";
import {RewardTree} from "./libraries/RewardTree.sol";

/// @title Pays replicas for serving, out of its own funds: whoever wants a federation's model served sends tokens here.
/// @notice What a member is owed stands in its leaf of the federation's rewards tree (`RewardTree.Leaf.served`), which
/// more than two thirds of a committee certified. Who answered whom is not provable on chain; what all leaves together
/// can draw is bounded by `PER_EPOCH` a settlement epoch, and by what was sent. Learning is paid from elsewhere: a
/// federation works on when nothing is left here. The same rules as InMemoryLedger.claim_served.
contract ServingPool {
    using SafeERC20 for IERC20;
    using RewardTree for RewardTree.Proof;

    event Claimed(uint32 indexed index, uint48 indexed round, uint256 amount);

    /// @notice The round can still be contested.
    error NotFinal();
    /// @notice The members would draw more than all epochs so far can allot: the root is false.
    error OverBudget();

    IFederation public immutable FEDERATION;
    IERC20 public immutable TOKEN;
    /// @notice Most that one settlement epoch allots [wei].
    uint128 public immutable PER_EPOCH;
    uint64 private immutable ROUNDS_PER_EPOCH;

    /// @notice Drawn so far, by registry index [wei].
    mapping(uint32 index => uint256) public claimed;
    /// @notice Drawn so far by all [wei].
    uint256 public claimedTotal;

    constructor(IFederation federation, IERC20 token, uint128 perEpoch) {
        FEDERATION = federation;
        TOKEN = token;
        PER_EPOCH = perEpoch;
        ROUNDS_PER_EPOCH = federation.params().roundsPerEpoch;
    }

    /// @notice Pay a member what a final root allots it for serving and it has not drawn, as far as there is anything.
    /// Anyone may call; the member is paid.
    /// @param position of the round in the federation's list of accepted rounds
    /// @param record the round
    /// @param index of the member
    /// @param proof its leaf
    /// @return paid [wei]
    function claim(
        uint32 position,
        IFederation.Record calldata record,
        uint32 index,
        RewardTree.Proof calldata proof
    ) external returns (uint256 paid) {
        if (!FEDERATION.isFinal(position, record)) revert NotFinal();
        IFederation.Statement calldata statement = record.statement;
        RewardTree.Node memory top = proof.root(index, statement.numLeaves);
        // The digest holds all but the sums of the root itself.
        if (
            top.digest != statement.root || top.cumulative != statement.cumulative || top.reward != statement.reward
                || top.contribution != statement.contribution
        ) revert RewardTree.BadProof();
        uint256 drawn = claimed[index];
        if (proof.leaf.served <= drawn) return 0;
        paid = Math.min(proof.leaf.served - drawn, TOKEN.balanceOf(address(this)));
        uint256 numEpochs = (uint256(statement.round) + 1) / ROUNDS_PER_EPOCH;
        if (claimedTotal + paid > PER_EPOCH * numEpochs) revert OverBudget();
        claimed[index] = drawn + paid;
        claimedTotal += paid;
        emit Claimed(index, statement.round, paid);
        TOKEN.safeTransfer(FEDERATION.members(index, 1)[0].account, paid);
    }
}
