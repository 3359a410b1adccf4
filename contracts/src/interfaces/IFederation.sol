// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {RewardTree} from "../libraries/RewardTree.sol";

/// @title The arbiter of one learning network: registry with stake, committee, rounds, claims.
/// @notice No owner, no proxy: its rules are its immutables. Amounts are in wei of the reward token, times in seconds,
/// contributions in nano-nats a token. `p2pfm/settlement/memory_ledger.py` states the same rules in Python.
/// A contribution itself cannot be proven on chain; more than two thirds of a committee answer for it.
interface IFederation {
    /// @param committeeSize most members of a committee
    /// @param membersMax most members of the registry: a rotation reads every stake
    /// @param minStake least stake to join [wei]
    /// @param poolPerEpoch most that one round may allot, and that each settlement epoch adds to the total [wei]
    /// @param roundsPerEpoch rounds of a settlement epoch
    /// @param challengeWindow from acceptance until a round is final [s]
    /// @param rotationPeriod least time between two committees [s]
    /// @param restartPeriod time without an accepted round after which anyone may restart [s]
    struct Params {
        uint32 committeeSize;
        uint32 membersMax;
        uint96 minStake;
        uint128 poolPerEpoch;
        uint64 roundsPerEpoch;
        uint64 challengeWindow;
        uint64 rotationPeriod;
        uint64 restartPeriod;
    }

    /// @param account receives the rewards
    /// @param stake locked [wei]
    /// @param isActive takes part in draws
    /// @param peer libp2p peer id, base58
    /// @param key BLS public key, G1 as EIP-2537 has it
    struct MemberView {
        address account;
        uint96 stake;
        bool isActive;
        string peer;
        uint256[4] key;
    }

    /// @notice What a committee certifies about a round.
    /// @param epoch of the committee that signed
    /// @param nonce restarts so far
    /// @param round strictly increasing; void rounds leave gaps
    /// @param prevRoot root of the accepted round before, 0 for the first
    /// @param root of the rewards tree
    /// @param cumulative sum over all leaves [wei]
    /// @param reward allotted by this round [wei]
    /// @param contribution sum of the positive contributions [nano-nats/token]
    /// @param data SHA-256 of the proposal: reveals, medians, weights and leaves, served by peers
    /// @param base SHA-256 of the new base adapter
    struct Statement {
        uint64 epoch;
        uint64 nonce;
        uint64 round;
        bytes32 prevRoot;
        bytes32 root;
        uint128 cumulative;
        uint128 reward;
        uint128 contribution;
        bytes32 data;
        bytes32 base;
    }

    /// @param statement as it was accepted
    /// @param acceptedAt block time of acceptance [s]
    struct RoundView {
        Statement statement;
        uint64 acceptedAt;
    }

    /// @notice All that a node polls, in one call.
    /// @param time of the block [s]
    /// @param epoch committee rotations so far; 0: no committee yet
    /// @param nonce restarts so far
    /// @param numMembers registered
    /// @param numRounds accepted and not voided
    /// @param headRound round number of the newest, if any
    /// @param headRoot its root, 0 if there is none
    /// @param pool funded and not allotted [wei]
    struct State {
        uint64 time;
        uint64 epoch;
        uint64 nonce;
        uint32 numMembers;
        uint32 numRounds;
        uint64 headRound;
        bytes32 headRoot;
        uint256 pool;
    }

    event Registered(uint32 indexed index, address indexed account, string peer, uint96 stake);
    event Rotated(uint64 indexed epoch, uint32[] committee);
    event Funded(address indexed sponsor, uint256 amount);
    event RoundAccepted(
        uint64 indexed round,
        bytes32 root,
        uint128 cumulative,
        uint128 reward,
        uint128 contribution,
        bytes32 data,
        bytes32 base
    );
    event Claimed(uint32 indexed index, address indexed account, uint64 indexed round, uint256 amount);
    event Restarted(uint64 nonce, uint256 numVoided);

    /// @notice The constructor's parameters cannot work together.
    error BadParameter();
    error RegistryFull();
    error AlreadyRegistered();
    /// @notice A peer id has 1 to 128 bytes.
    error BadPeer();
    error PeerTaken();
    error KeyTaken();
    error StakeTooLow();
    /// @notice The proof is not of this key, account, peer, contract and chain, or the key is no point of the group.
    error BadPossession();
    /// @notice A rotation or a restart before its time.
    error TooEarly();
    error NoMembers();
    /// @notice Signed under a nonce that a restart has killed.
    error BadNonce();
    /// @notice Signed by a committee that is neither the present one nor the one before.
    error BadEpoch();
    /// @notice Not after the newest accepted round.
    error StaleRound();
    /// @notice Does not build on the newest accepted root.
    error BadPrevRoot();
    /// @notice cumulative is not the one before plus reward.
    error BadSums();
    /// @notice Allots more than the pool, the round's budget or the epochs' budget holds.
    error OverBudget();
    /// @notice Not strictly ascending, or not of the committee.
    error BadAbsent();
    /// @notice Two thirds of the committee or fewer have signed.
    error BadQuorum();
    error BadSignature();
    error UnknownRound();
    /// @notice The challenge window is still open.
    error NotFinal();
    error UnknownMember();
    error BadProof();

    /// @notice Join with a stake, taken from the caller, who must have approved it.
    /// @dev A stranger can take a free peer id, not use it: off chain every message is signed by the peer's own key.
    /// @param peer libp2p peer id
    /// @param key G1 as EIP-2537 has it
    /// @param possession signature of `possessionMessage`, G2 as EIP-2537 has it, under the BLS_POP domain tag
    /// @param stake [wei]
    /// @return index position in the registry, and of the leaf in every rewards tree
    function register(
        string calldata peer,
        uint256[4] calldata key,
        uint256[8] calldata possession,
        uint96 stake
    ) external returns (uint32 index);

    /// @notice Draw the next committee by stake, and fix the seed and the candidates of the draw after it.
    /// @dev While the registry is no larger than a committee, everybody is in it. Anyone may call.
    function rotate() external;

    /// @notice Add to the pool; the caller must have approved it.
    /// @param amount [wei]
    function fund(uint256 amount) external;

    /// @notice Commit a certified round. Anyone may; the first valid root of a round stands.
    /// @param statement what was signed
    /// @param absent registry indices of the committee's members who did not sign, ascending
    /// @param signature sum of all others' signatures, G2 as EIP-2537 has it
    function submitRound(
        Statement calldata statement,
        uint32[] calldata absent,
        uint256[8] calldata signature
    ) external;

    /// @notice Pay a member all that a final root owes it and it has not drawn. Anyone may call; the member is paid.
    /// @param position of the round in the list of accepted rounds
    /// @param index of the member
    /// @param leaf its leaf
    /// @param siblings from the leaf up to the root
    /// @return paid [wei]; 0 if nothing was left
    function claim(
        uint256 position,
        uint32 index,
        RewardTree.Leaf calldata leaf,
        RewardTree.Node[] calldata siblings
    ) external returns (uint256 paid);

    /// @notice After `restartPeriod` without progress: kill outstanding signatures, void rounds that are not final.
    function restartRound() external;

    /// @notice Version of this interface.
    function VERSION() external view returns (uint256);

    /// @notice The reward token.
    function token() external view returns (address);

    /// @notice The rules.
    function params() external view returns (Params memory);

    /// @notice What a node polls.
    function state() external view returns (State memory);

    /// @notice Members from `first` on, at most `count`.
    function members(uint256 first, uint256 count) external view returns (MemberView[] memory);

    /// @notice A committee in the order of its draw; empty for an unknown epoch.
    function committee(uint64 epoch) external view returns (uint32[] memory);

    /// @notice Accepted rounds from position `first` on, at most `count`.
    function rounds(uint256 first, uint256 count) external view returns (RoundView[] memory);

    /// @notice What a member has drawn [wei].
    function claimed(uint32 index) external view returns (uint256);

    /// @notice Seed of the next draw, fixed by the rotation before it.
    function seed() external view returns (bytes32);

    /// @notice How many members, from the registry's start, the next draw may choose from.
    function numCandidates() external view returns (uint32);

    /// @notice The 32 bytes that a committee signs.
    function roundMessage(Statement calldata statement) external view returns (bytes32);

    /// @notice The 32 bytes that a proof of possession signs.
    function possessionMessage(address account, string calldata peer, uint256[4] calldata key)
        external
        view
        returns (bytes32);
}
