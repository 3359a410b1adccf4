// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {RewardTree} from "../libraries/RewardTree.sol";

/// @title The arbiter of one learning network: registry with stake, committee, rounds, contests, claims.
/// @notice No owner, no proxy: its rules are its immutables. Amounts are in wei of the reward token, times in seconds,
/// contributions in nano-nats a token. `p2pfm/settlement/memory_ledger.py` states the same rules in Python.
/// A contribution itself cannot be proven on chain; more than two thirds of a committee answer for it. How it is paid
/// can: whoever proves a wrong reward, a wrong sum or a leaf that nobody shows voids the round, and its signers are
/// slashed.
interface IFederation {
    /// @param committeeSize most members of a committee, at most 256
    /// @param membersMax most members of the registry: a rotation reads every stake
    /// @param minStake least stake to join [wei]
    /// @param leafBond put up with every demand for a leaf [wei]
    /// @param poolPerEpoch what the paying round of a settlement epoch divides [wei]
    /// @param roundsPerEpoch rounds of a settlement epoch
    /// @param challengeWindow from acceptance until a round is final, unless a leaf was demanded [s]
    /// @param responsePeriod to show a leaf, and then again to prove a fault with it [s]
    /// @param unbondingPeriod from when a leaver can sign no more until its stake is free [s]
    /// @param rotationPeriod least time between two committees [s]
    /// @param restartPeriod time without an accepted round after which anyone may restart [s]
    struct Params {
        uint32 committeeSize;
        uint32 membersMax;
        uint96 minStake;
        uint128 leafBond;
        uint128 poolPerEpoch;
        uint64 roundsPerEpoch;
        uint64 challengeWindow;
        uint64 responsePeriod;
        uint64 unbondingPeriod;
        uint64 rotationPeriod;
        uint64 restartPeriod;
    }

    /// @param account receives the rewards
    /// @param stake locked [wei]; 0 after a slash or a withdrawal
    /// @param isActive neither leaving nor slashed
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
    /// @param nonce restarts and slashes so far
    /// @param round strictly increasing; void rounds leave gaps
    /// @param prevRoot root of the accepted round before, 0 for the first
    /// @param root of the rewards tree
    /// @param numLeaves of the tree, one for each of the first members of the registry; it never falls
    /// @param cumulative sum over all leaves [wei]
    /// @param reward allotted by this round [wei]
    /// @param contribution sum of the positive contributions [nano-nats/token]
    /// @param data SHA-256 of the proposal: reveals, medians, weights and leaves, served by peers
    /// @param base SHA-256 of the new base adapter
    struct Statement {
        uint32 epoch;
        uint32 nonce;
        uint48 round;
        bytes32 prevRoot;
        bytes32 root;
        uint32 numLeaves;
        uint128 cumulative;
        uint128 reward;
        uint128 contribution;
        bytes32 data;
        bytes32 base;
    }

    /// @param absent bit i: the committee's seat i (in the order of its draw) has not signed
    /// @param signature sum of all others' signatures, G2 as EIP-2537 has it
    struct Certificate {
        Statement statement;
        uint256 absent;
        uint256[8] signature;
    }

    /// @notice An accepted round. Storage holds only its hash: whoever refers to one shows it, as `RoundAccepted` told it.
    /// @param acceptedAt block time of acceptance [s]
    struct Record {
        Statement statement;
        uint256 absent;
        uint64 acceptedAt;
    }

    /// @notice An accepted round by its position, with the one before it, to which a void goes back.
    /// @param previous anything for position 0
    struct Place {
        uint32 position;
        Record record;
        Record previous;
    }

    enum Fault {
        Reward,
        Transition,
        Leaf,
        Equivocation
    }

    /// @notice All that a node polls, in one call.
    /// @param time of the block [s]
    /// @param epoch committee rotations so far; 0: no committee yet
    /// @param epochMin certificates of earlier epochs are dead, because a member was slashed
    /// @param nonce restarts and slashes so far
    /// @param numMembers ever registered
    /// @param numRounds accepted and not voided
    /// @param headRound round number of the newest, if any
    /// @param headRoot its root, 0 if there is none
    /// @param pool funded and not allotted [wei]
    /// @param cumulative allotted so far [wei]
    /// @param claimed drawn so far [wei]
    /// @param holdFrom rounds from this position on ...
    /// @param holdUntil ... are not final before this time [s]
    struct State {
        uint64 time;
        uint32 epoch;
        uint32 epochMin;
        uint32 nonce;
        uint32 numMembers;
        uint32 numRounds;
        uint48 headRound;
        bytes32 headRoot;
        uint128 pool;
        uint128 cumulative;
        uint128 claimed;
        uint32 holdFrom;
        uint64 holdUntil;
    }

    event Registered(uint32 indexed index, address indexed account, string peer, uint96 stake);
    event Left(uint32 indexed index);
    event Withdrawn(uint32 indexed index, uint96 amount);
    event Rotated(uint32 indexed epoch, uint32[] committee);
    event Funded(address indexed sponsor, uint256 amount);
    event RoundAccepted(uint32 indexed position, uint48 indexed round, Record record);
    event Claimed(uint32 indexed index, uint48 indexed round, uint256 amount);
    event Demanded(
        uint256 indexed number, address indexed account, uint32 indexed position, uint32 index, uint64 deadline
    );
    event Shown(uint256 indexed number, address indexed account, RewardTree.Leaf leaf);
    event Closed(uint256 indexed number);
    event Slashed(uint32 indexed index, uint96 amount);
    event Contested(uint48 indexed round, Fault indexed fault, address indexed account, uint256 bounty);
    event Voided(uint32 indexed position, uint48 indexed round, uint32 nonce);
    event Restarted(uint32 nonce);

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
    /// @notice The caller is no member.
    error UnknownMember();
    /// @notice The caller is leaving already, or was slashed.
    error NotActive();
    /// @notice The caller has not left, or has no stake any more.
    error NotLeaving();
    /// @notice What the caller may have signed can still be contested.
    error StillLiable();
    /// @notice A rotation, a restart or the end of a demand before its time.
    error TooEarly();
    error NoMembers();
    /// @notice Signed under a nonce that a restart or a slash has killed.
    error BadNonce();
    /// @notice Signed by a committee that is neither the present one nor the one before, or whose member was slashed.
    error BadEpoch();
    /// @notice Not after the newest accepted round.
    error StaleRound();
    /// @notice Does not build on the newest accepted root.
    error BadPrevRoot();
    /// @notice Fewer leaves than the round before, or more than there are members.
    error BadLeaves();
    /// @notice cumulative is not the one before plus reward.
    error BadSums();
    /// @notice Allots more than the pool or the epoch's budget holds, or anything in a round that does not pay.
    error OverBudget();
    /// @notice A bit beyond the committee's seats.
    error BadAbsent();
    /// @notice Two thirds of the committee or fewer have signed.
    error BadQuorum();
    error BadSignature();
    /// @notice No accepted round has this record at this position (any more).
    error UnknownRound();
    /// @notice The round can still be contested.
    error NotFinal();
    /// @notice The round is final, or its challenge window is over.
    error NotContestable();
    /// @notice The members would draw more than all rounds allotted: some final root is false.
    error Drained();
    /// @notice The tree has no such leaf.
    error UnknownLeaf();
    /// @notice No such demand, or it has ended.
    error UnknownDemand();
    /// @notice The demand's deadline has passed.
    error TooLate();
    /// @notice What was shown breaks no rule.
    error NoFault();

    /// @notice Join with a stake, taken from the caller, who must have approved it.
    /// @dev A stranger can take a free peer id, not use it: off chain every message is signed by the peer's own key.
    /// @param peer libp2p peer id
    /// @param key G1 as EIP-2537 has it
    /// @param possession signature of `possessionMessage`, G2 as EIP-2537 has it, under the BLS_POP domain tag
    /// @param stake [wei]
    /// @return index position in the registry, and of the leaf in every rewards tree
    function register(string calldata peer, uint256[4] calldata key, uint256[8] calldata possession, uint96 stake)
        external
        returns (uint32 index);

    /// @notice Begin to unbond. The next draw's seed is known, so a leaver stays in it: nobody steers a draw by leaving.
    function unbond() external;

    /// @notice Take the stake back, `unbondingPeriod` after the last committee that the caller may sit on is dead.
    /// @return amount [wei]
    function withdraw() external returns (uint96 amount);

    /// @notice Draw the next committee by stake, and fix the seed and the candidates of the draw after it.
    /// @dev While the registry is no larger than a committee, everybody is in it. Anyone may call.
    function rotate() external;

    /// @notice Add to the pool; the caller must have approved it.
    /// @param amount [wei]
    function fund(uint128 amount) external;

    /// @notice Commit a certified round. Anyone may; the first valid root of a round stands.
    function submitRound(Certificate calldata certificate) external;

    /// @notice Pay a member all that a final root owes it and it has not drawn. Anyone may call; the member is paid.
    /// @param position of the round in the list of accepted rounds
    /// @param record the round
    /// @param index of the member
    /// @param proof its leaf
    /// @return paid [wei]; 0 if nothing was left
    function claim(uint32 position, Record calldata record, uint32 index, RewardTree.Proof calldata proof)
        external
        returns (uint256 paid);

    /// @notice After `restartPeriod` without progress: outstanding signatures die. Accepted rounds are final by then.
    function restart() external;

    /// @notice Contest a round by proving that a leaf's reward is not floor(pool * contribution / sum) in a paying
    /// round, or not 0 in another. A paying round is the first accepted at or after an epoch's last.
    function proveReward(Place calldata place, uint32 index, RewardTree.Proof calldata proof) external;

    /// @notice Contest a round by proving that a leaf's sum is not its sum before plus its reward.
    /// @param before the leaf in the tree before; ignored if that had none at `index` (its sum was 0)
    function proveTransition(
        Place calldata place,
        uint32 index,
        RewardTree.Proof calldata before,
        RewardTree.Proof calldata proof
    ) external;

    /// @notice Slash who signed both of two different statements about one round. Voids no accepted round: the first
    /// valid root stands, or a single liar could void any. What is not accepted yet dies with the committee (`Restarted`).
    function proveEquivocation(Certificate calldata first, Certificate calldata second) external;

    /// @notice Contest a round whose leaf nobody shows, with a bond, which the caller must have approved.
    /// @return number of the demand
    function demandLeaf(uint32 position, Record calldata record, uint32 index) external returns (uint256 number);

    /// @notice Answer a demand: the leaf is public then, and the bond is the caller's.
    function showLeaf(uint256 number, Record calldata record, RewardTree.Proof calldata proof) external;

    /// @notice After the deadline: void the round, give the bond back and pay the bounty to who demanded. If the round
    /// was voided already, or is final, only give the bond back.
    /// @param place ignored if the round was voided
    function closeDemand(uint256 number, Place calldata place) external;

    /// @notice Version of this interface.
    function VERSION() external view returns (uint256);

    /// @notice The block of deployment: where to begin to read events.
    function DEPLOYED_BLOCK() external view returns (uint256);

    /// @notice The reward token.
    function token() external view returns (address);

    /// @notice The rules.
    function params() external view returns (Params memory);

    /// @notice What a node polls.
    function state() external view returns (State memory);

    /// @notice Members from `first` on, at most `count`.
    function members(uint256 first, uint256 count) external view returns (MemberView[] memory);

    /// @notice A committee in the order of its draw; empty for an unknown epoch.
    function committee(uint32 epoch) external view returns (uint32[] memory);

    /// @notice keccak256 of the record at a position; 0 if no round is accepted there.
    function recordHash(uint32 position) external view returns (bytes32);

    /// @notice Whether the round can be contested no more. Reverts with UnknownRound.
    function isFinal(uint32 position, Record calldata record) external view returns (bool);

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
