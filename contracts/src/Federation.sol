// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {IFederation} from "./interfaces/IFederation.sol";
import {BLS381} from "./libraries/BLS381.sol";
import {RewardTree} from "./libraries/RewardTree.sol";

/// @title See IFederation. The same rules, in the same order, as InMemoryLedger.
contract Federation is IFederation {
    using SafeERC20 for IERC20;
    using BLS381 for BLS381.G1;
    using BLS381 for BLS381.PackedG1;
    using RewardTree for RewardTree.Proof;

    struct Member {
        address account;
        uint96 stake;
        BLS381.PackedG1 key;
        string peer;
    }

    /// @dev One slot: all of a round's progress that is no sum and no hash.
    struct Head {
        uint48 round;
        uint48 progressAt;
        uint32 numLeaves;
        uint32 epoch;
        uint32 epochMin;
        uint32 nonce;
        uint32 numRounds;
    }

    /// @dev One slot [wei].
    struct Money {
        uint128 cumulative;
        uint128 pool;
    }

    /// @dev One slot: rounds from `from` on are not final before `until`; when and of whom the next draw may be.
    struct Times {
        uint64 until;
        uint32 from;
        uint64 rotatableAt;
        uint32 numCandidates;
    }

    /// @param hash of the contested record
    struct Demand {
        address account;
        uint64 deadline;
        bool isOpen;
        uint32 position;
        uint32 index;
        bytes32 hash;
    }

    uint256 public constant VERSION = 3;
    uint256 private constant PEER_BYTES_MAX = 128;
    uint256 private constant COMMITTEE_MAX = 256;
    /// @dev Longer than anyone waits, and far from where 64-bit times overflow [s].
    uint256 private constant CONTEST_MAX = 3650 days;
    /// @dev What a rotation may cost: below the cap of one transaction (EIP-7825), or nobody could draw any more. It reads
    /// every stake, and goes through all of them once a seat (measured in bench/gas.py).
    uint256 private constant ROTATION_GAS_MAX = 15_500_000;
    /// @dev A rotation must not kill a round in flight.
    uint32 private constant EPOCH_LAG_MAX = 1;
    /// @dev Part of what is slashed that goes to who proved the fault; the rest goes to the pool.
    uint256 private constant BOUNTY_DIVISOR = 4;

    bytes private constant SIGNATURE_TAG = "BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_";
    bytes private constant POSSESSION_TAG = "BLS_POP_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_";
    bytes32 private constant POSSESSION_TYPEHASH =
        keccak256("Possession(uint256 chainId,address federation,address account,bytes32 peer,bytes32 key)");
    bytes32 private constant ROUND_TYPEHASH = keccak256(
        "Round(uint256 chainId,address federation,uint32 epoch,uint32 nonce,uint48 round,bytes32 prevRoot,bytes32 root,uint32 numLeaves,uint128 cumulative,uint128 reward,uint128 contribution,bytes32 data,bytes32 base)"
    );

    uint256 public immutable DEPLOYED_BLOCK;
    address public immutable token;
    uint32 private immutable COMMITTEE_SIZE;
    uint32 private immutable MEMBERS_MAX;
    uint96 private immutable MIN_STAKE;
    uint128 private immutable LEAF_BOND;
    uint128 private immutable POOL_PER_EPOCH;
    uint64 private immutable ROUNDS_PER_EPOCH;
    uint64 private immutable CHALLENGE_WINDOW;
    uint64 private immutable RESPONSE_PERIOD;
    uint64 private immutable UNBONDING_PERIOD;
    uint64 private immutable ROTATION_PERIOD;
    uint64 private immutable RESTART_PERIOD;

    Head private _head;
    Money private _money;
    bytes32 private _headRoot;
    Times private _times;
    uint128 private _claimedTotal;
    bytes32 public seed;

    Member[] private _members;
    /// @dev Registry index + 1; 0: none.
    mapping(address account => uint32) private _places;
    mapping(bytes32 peerHash => bool) private _isPeerTaken;
    mapping(bytes32 keyHash => bool) private _isKeyTaken;
    /// @dev A bit a leaver, so that a draw need not read every member's last epoch.
    mapping(uint256 word => uint256) private _leaverBits;
    /// @dev Of leavers: the last epoch for which they may be drawn.
    mapping(uint256 index => uint32) private _lastEpochs;

    mapping(uint32 epoch => uint32[]) private _committees;
    mapping(uint32 epoch => BLS381.PackedG1) private _committeeKeys;
    mapping(uint32 epoch => uint64) private _drawnAt;

    /// @dev keccak256 of each Record; what lies at `_head.numRounds` and beyond is void.
    mapping(uint32 position => bytes32) private _records;
    Demand[] private _demands;
    mapping(uint32 index => uint256) public claimed;

    constructor(address token_, Params memory p) {
        uint256 contest = uint256(p.challengeWindow) + 2 * uint256(p.responsePeriod);
        uint256 seats = p.committeeSize;
        uint256 rotation = uint256(p.membersMax) * (3000 + 170 * seats) + 25_000 * seats;
        if (
            p.committeeSize == 0 || p.minStake == 0 || p.roundsPerEpoch == 0 || p.responsePeriod == 0
                || p.leafBond == 0 || p.committeeSize > COMMITTEE_MAX || p.membersMax < p.committeeSize
                || p.restartPeriod < contest || p.unbondingPeriod < contest || token_ == address(0)
                || contest > CONTEST_MAX || rotation > ROTATION_GAS_MAX
        ) revert BadParameter();
        token = token_;
        COMMITTEE_SIZE = p.committeeSize;
        MEMBERS_MAX = p.membersMax;
        MIN_STAKE = p.minStake;
        LEAF_BOND = p.leafBond;
        POOL_PER_EPOCH = p.poolPerEpoch;
        ROUNDS_PER_EPOCH = p.roundsPerEpoch;
        CHALLENGE_WINDOW = p.challengeWindow;
        RESPONSE_PERIOD = p.responsePeriod;
        UNBONDING_PERIOD = p.unbondingPeriod;
        ROTATION_PERIOD = p.rotationPeriod;
        RESTART_PERIOD = p.restartPeriod;
        DEPLOYED_BLOCK = block.number;
        _head.progressAt = uint48(block.timestamp);
        _head.epochMin = 1;
        seed = keccak256(abi.encode(block.prevrandao, blockhash(block.number - 1), address(this)));
    }

    // --- membership -------------------------------------------------------------------------------------------------

    /// @inheritdoc IFederation
    function register(string calldata peer, uint256[4] calldata key, uint256[8] calldata possession, uint96 stake)
        external
        returns (uint32 index)
    {
        bytes32 peerHash = keccak256(bytes(peer));
        bytes32 keyHash = keccak256(abi.encode(key));
        if (_members.length >= MEMBERS_MAX) revert RegistryFull();
        if (_places[msg.sender] != 0) revert AlreadyRegistered();
        if (bytes(peer).length == 0 || bytes(peer).length > PEER_BYTES_MAX) revert BadPeer();
        if (_isPeerTaken[peerHash]) revert PeerTaken();
        if (_isKeyTaken[keyHash]) revert KeyTaken();
        if (stake < MIN_STAKE) revert StakeTooLow();
        BLS381.G1 memory point = BLS381.G1(key[0], key[1], key[2], key[3]);
        bytes32 message = possessionMessage(msg.sender, peer, key);
        if (!point.verify(message, possession, POSSESSION_TAG)) revert BadPossession();

        index = uint32(_members.length);
        _members.push(Member(msg.sender, stake, point.pack(), peer));
        _places[msg.sender] = index + 1;
        _isPeerTaken[peerHash] = true;
        _isKeyTaken[keyHash] = true;
        emit Registered(index, msg.sender, peer, stake);
        IERC20(token).safeTransferFrom(msg.sender, address(this), stake);
    }

    /// @inheritdoc IFederation
    function unbond() external {
        uint32 index = _indexOf(msg.sender);
        if (_members[index].stake == 0 || _isLeaver(index)) revert NotActive();
        _leaverBits[index >> 8] |= 1 << (index & 255);
        _lastEpochs[index] = _head.epoch + 1;
        emit Left(index);
    }

    /// @inheritdoc IFederation
    function withdraw() external returns (uint96 amount) {
        uint32 index = _indexOf(msg.sender);
        Member storage member = _members[index];
        amount = member.stake;
        if (amount == 0 || !_isLeaver(index)) revert NotLeaving();
        uint32 freeEpoch = _lastEpochs[index] + EPOCH_LAG_MAX + 1;
        if (_head.epoch < freeEpoch || block.timestamp < _drawnAt[freeEpoch] + UNBONDING_PERIOD) revert StillLiable();
        BLS381.G1 memory key = member.key.unpack();
        member.stake = 0;
        delete _places[msg.sender];
        delete _isPeerTaken[keccak256(bytes(member.peer))];
        delete _isKeyTaken[keccak256(abi.encode(key.xHigh, key.xLow, key.yHigh, key.yLow))];
        emit Withdrawn(index, amount);
        IERC20(token).safeTransfer(msg.sender, amount);
    }

    /// @inheritdoc IFederation
    function rotate() external {
        uint256 count = _members.length;
        if (block.timestamp < _times.rotatableAt) revert TooEarly();
        if (count == 0) revert NoMembers();
        uint32 epoch = ++_head.epoch;
        // A counter of ours, which nobody can nudge by sending something.
        // slither-disable-next-line incorrect-equality
        bool isEverybody = count <= COMMITTEE_SIZE || epoch == 1;
        uint32[] memory drawn = _draw(isEverybody ? count : _times.numCandidates, epoch);
        _committees[epoch] = drawn;
        _committeeKeys[epoch] = _sumKeys(drawn, 0).pack();
        _drawnAt[epoch] = uint64(block.timestamp);
        seed = keccak256(abi.encode(seed, block.prevrandao, blockhash(block.number - 1)));
        _times.rotatableAt = uint64(block.timestamp) + ROTATION_PERIOD;
        _times.numCandidates = uint32(count);
        emit Rotated(epoch, drawn);
    }

    // --- rounds and rewards -----------------------------------------------------------------------------------------

    /// @inheritdoc IFederation
    function fund(uint128 amount) external {
        _money.pool += amount;
        emit Funded(msg.sender, amount);
        IERC20(token).safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IFederation
    function submitRound(Certificate calldata certificate) external {
        Statement calldata statement = certificate.statement;
        Head memory head = _head;
        Money memory money = _money;
        _validatePlace(statement, head);
        _validateSums(statement, head, money);
        _validateQuorum(certificate);

        uint32 position = head.numRounds;
        head.round = statement.round;
        head.progressAt = uint48(block.timestamp);
        head.numLeaves = statement.numLeaves;
        head.numRounds = position + 1;
        _head = head;
        _money = Money(statement.cumulative, money.pool - statement.reward);
        _headRoot = statement.root;
        Record memory record = Record(statement, certificate.absent, uint64(block.timestamp));
        _records[position] = keccak256(abi.encode(record));
        emit RoundAccepted(position, statement.round, record);
    }

    /// @inheritdoc IFederation
    function claim(uint32 position, Record calldata record, uint32 index, RewardTree.Proof calldata proof)
        external
        returns (uint256 paid)
    {
        if (!isFinal(position, record)) revert NotFinal();
        _validateLeaf(record.statement, index, proof);
        uint256 drawn = claimed[index];
        if (proof.leaf.cumulative <= drawn) return 0;
        paid = proof.leaf.cumulative - drawn;
        uint256 total = _claimedTotal + paid;
        if (total > _money.cumulative) revert Drained();
        claimed[index] = proof.leaf.cumulative;
        _claimedTotal = uint128(total);
        emit Claimed(index, record.statement.round, paid);
        IERC20(token).safeTransfer(_members[index].account, paid);
    }

    /// @inheritdoc IFederation
    function restart() external {
        if (block.timestamp < _head.progressAt + RESTART_PERIOD) revert TooEarly();
        _head.progressAt = uint48(block.timestamp);
        emit Restarted(++_head.nonce);
    }

    // --- contests ---------------------------------------------------------------------------------------------------

    /// @inheritdoc IFederation
    function demandLeaf(uint32 position, Record calldata record, uint32 index) external returns (uint256 number) {
        bytes32 hash = _validateRecord(position, record);
        if (block.timestamp >= record.acceptedAt + CHALLENGE_WINDOW) revert NotContestable();
        if (index >= record.statement.numLeaves) revert UnknownLeaf();
        uint64 deadline = uint64(block.timestamp) + RESPONSE_PERIOD;
        bool isHeld = block.timestamp < _times.until;
        if (!isHeld || position < _times.from) _times.from = position;
        if (!isHeld || deadline + RESPONSE_PERIOD > _times.until) _times.until = deadline + RESPONSE_PERIOD;
        number = _demands.length;
        _demands.push(Demand(msg.sender, deadline, true, position, index, hash));
        emit Demanded(number, msg.sender, position, index, deadline);
        IERC20(token).safeTransferFrom(msg.sender, address(this), LEAF_BOND);
    }

    /// @inheritdoc IFederation
    function showLeaf(uint256 number, Record calldata record, RewardTree.Proof calldata proof) external {
        Demand storage demand = _openDemand(number);
        if (_validateRecord(demand.position, record) != demand.hash) revert UnknownRound();
        if (block.timestamp >= demand.deadline) revert TooLate();
        _validateLeaf(record.statement, demand.index, proof);
        demand.isOpen = false;
        emit Shown(number, msg.sender, proof.leaf);
        IERC20(token).safeTransfer(msg.sender, LEAF_BOND);
    }

    /// @inheritdoc IFederation
    function closeDemand(uint256 number, Place calldata place) external {
        Demand storage demand = _openDemand(number);
        address account = demand.account;
        uint256 paid = LEAF_BOND;
        demand.isOpen = false;
        emit Closed(number);
        // Whether two hashes are the same: nothing near it would do.
        // slither-disable-next-line incorrect-equality
        if (recordHash(demand.position) == demand.hash) {
            if (place.position != demand.position) revert UnknownRound();
            if (!isFinal(place.position, place.record)) {
                if (block.timestamp < demand.deadline) revert TooEarly();
                paid += _condemn(account, place, Fault.Leaf);
            }
        }
        IERC20(token).safeTransfer(account, paid);
    }

    /// @inheritdoc IFederation
    function proveReward(Place calldata place, uint32 index, RewardTree.Proof calldata proof) external {
        Statement calldata statement = place.record.statement;
        _validateContestable(place);
        _validateLeaf(statement, index, proof);
        uint256 last = place.position == 0 ? 0 : uint256(place.previous.statement.round) + 1;
        uint256 reward = 0;
        if (_isPayout(statement.round, last) && statement.contribution > 0) {
            uint256 contribution = RewardTree.positive(proof.leaf.contribution);
            reward = Math.mulDiv(POOL_PER_EPOCH, contribution, statement.contribution);
        }
        if (proof.leaf.reward == reward) revert NoFault();
        IERC20(token).safeTransfer(msg.sender, _condemn(msg.sender, place, Fault.Reward));
    }

    /// @inheritdoc IFederation
    function proveTransition(
        Place calldata place,
        uint32 index,
        RewardTree.Proof calldata before,
        RewardTree.Proof calldata proof
    ) external {
        _validateContestable(place);
        _validateLeaf(place.record.statement, index, proof);
        uint256 drawn = 0;
        if (place.position > 0 && index < place.previous.statement.numLeaves) {
            _validateLeaf(place.previous.statement, index, before);
            drawn = before.leaf.cumulative;
        }
        if (proof.leaf.cumulative == drawn + proof.leaf.reward) revert NoFault();
        IERC20(token).safeTransfer(msg.sender, _condemn(msg.sender, place, Fault.Transition));
    }

    /// @inheritdoc IFederation
    function proveEquivocation(Certificate calldata first, Certificate calldata second) external {
        Statement calldata a = first.statement;
        Statement calldata b = second.statement;
        if (a.epoch != b.epoch || a.nonce != b.nonce || a.round != b.round) revert NoFault();
        if (roundMessage(a) == roundMessage(b)) revert NoFault();
        _validateSignature(first);
        _validateSignature(second);
        uint256 total = _slash(a.epoch, first.absent | second.absent);
        if (total == 0) revert NoFault();
        emit Restarted(_head.nonce);
        IERC20(token).safeTransfer(msg.sender, _split(msg.sender, a.round, Fault.Equivocation, total));
    }

    // --- reads ------------------------------------------------------------------------------------------------------

    /// @inheritdoc IFederation
    function params() external view returns (Params memory) {
        return Params({
            committeeSize: COMMITTEE_SIZE,
            membersMax: MEMBERS_MAX,
            minStake: MIN_STAKE,
            leafBond: LEAF_BOND,
            poolPerEpoch: POOL_PER_EPOCH,
            roundsPerEpoch: ROUNDS_PER_EPOCH,
            challengeWindow: CHALLENGE_WINDOW,
            responsePeriod: RESPONSE_PERIOD,
            unbondingPeriod: UNBONDING_PERIOD,
            rotationPeriod: ROTATION_PERIOD,
            restartPeriod: RESTART_PERIOD
        });
    }

    /// @inheritdoc IFederation
    function state() external view returns (State memory) {
        Head memory head = _head;
        return State({
            time: uint64(block.timestamp),
            epoch: head.epoch,
            epochMin: head.epochMin,
            nonce: head.nonce,
            numMembers: uint32(_members.length),
            numRounds: head.numRounds,
            headRound: head.round,
            headRoot: _headRoot,
            pool: _money.pool,
            cumulative: _money.cumulative,
            claimed: _claimedTotal,
            holdFrom: _times.from,
            holdUntil: _times.until
        });
    }

    /// @inheritdoc IFederation
    function members(uint256 first, uint256 count) external view returns (MemberView[] memory list) {
        uint256 end = Math.min(_members.length, Math.saturatingAdd(first, count));
        list = new MemberView[](first < end ? end - first : 0);
        for (uint256 i = 0; i < list.length; ++i) {
            Member memory member = _members[first + i];
            BLS381.G1 memory key = member.key.unpack();
            list[i] = MemberView({
                account: member.account,
                stake: member.stake,
                isActive: member.stake > 0 && !_isLeaver(first + i),
                peer: member.peer,
                key: [key.xHigh, key.xLow, key.yHigh, key.yLow]
            });
        }
    }

    /// @inheritdoc IFederation
    function committee(uint32 epoch) external view returns (uint32[] memory) {
        return _committees[epoch];
    }

    /// @inheritdoc IFederation
    function numCandidates() external view returns (uint32) {
        return _times.numCandidates;
    }

    /// @inheritdoc IFederation
    function recordHash(uint32 position) public view returns (bytes32) {
        return position < _head.numRounds ? _records[position] : bytes32(0);
    }

    /// @inheritdoc IFederation
    function isFinal(uint32 position, Record calldata record) public view returns (bool) {
        _validateRecord(position, record);
        bool isHeld = position >= _times.from && block.timestamp < _times.until;
        return block.timestamp >= record.acceptedAt + CHALLENGE_WINDOW + (isHeld ? 2 * RESPONSE_PERIOD : 0);
    }

    /// @inheritdoc IFederation
    function possessionMessage(address account, string calldata peer, uint256[4] calldata key)
        public
        view
        returns (bytes32)
    {
        bytes32 peerHash = keccak256(bytes(peer));
        bytes32 keyHash = keccak256(abi.encode(key));
        return keccak256(abi.encode(POSSESSION_TYPEHASH, block.chainid, address(this), account, peerHash, keyHash));
    }

    /// @inheritdoc IFederation
    function roundMessage(Statement calldata statement) public view returns (bytes32) {
        return keccak256(abi.encode(ROUND_TYPEHASH, block.chainid, address(this), statement));
    }

    // --- rules of a round -------------------------------------------------------------------------------------------

    function _validatePlace(Statement calldata statement, Head memory head) private view {
        uint32 epoch = statement.epoch;
        if (statement.nonce != head.nonce) revert BadNonce();
        if (epoch < head.epochMin || epoch > head.epoch || epoch + EPOCH_LAG_MAX < head.epoch) revert BadEpoch();
        if (head.numRounds > 0 && statement.round <= head.round) revert StaleRound();
        if (statement.prevRoot != _headRoot) revert BadPrevRoot();
        if (statement.numLeaves < head.numLeaves || statement.numLeaves > _members.length) revert BadLeaves();
    }

    function _validateSums(Statement calldata statement, Head memory head, Money memory money) private view {
        if (statement.cumulative != uint256(money.cumulative) + statement.reward) revert BadSums();
        // A counter of ours, which nobody can nudge by sending something.
        // slither-disable-next-line incorrect-equality
        uint256 last = head.numRounds == 0 ? 0 : uint256(head.round) + 1;
        uint256 budget = _isPayout(statement.round, last) ? POOL_PER_EPOCH : 0;
        if (statement.reward > budget || statement.reward > money.pool) revert OverBudget();
    }

    /// @param last the number after that of the round accepted before; 0 if there is none
    function _isPayout(uint48 round, uint256 last) private view returns (bool) {
        return (uint256(round) + 1) / ROUNDS_PER_EPOCH > last / ROUNDS_PER_EPOCH;
    }

    function _validateQuorum(Certificate calldata certificate) private view {
        uint256 size = _committees[certificate.statement.epoch].length;
        uint256 present = size;
        for (uint256 rest = certificate.absent; rest != 0; rest &= rest - 1) {
            if (present == 0) revert BadAbsent();
            --present;
        }
        _validateSeats(size, certificate.absent);
        if (present < 2 * size / 3 + 1) revert BadQuorum();
        _validateSignature(certificate);
    }

    function _validateSeats(uint256 size, uint256 absent) private pure {
        if (size < COMMITTEE_MAX && absent >> size != 0) revert BadAbsent();
    }

    /// @dev By the committee's key less those of the absent.
    function _validateSignature(Certificate calldata certificate) private view {
        uint32 epoch = certificate.statement.epoch;
        uint256 absent = certificate.absent;
        BLS381.G1 memory key = _committeeKeys[epoch].unpack();
        if (absent != 0) {
            uint32[] memory seats = _committees[epoch];
            _validateSeats(seats.length, absent);
            key = key.add(_sumKeys(seats, ~absent).negate());
        }
        if (!key.verify(roundMessage(certificate.statement), certificate.signature, SIGNATURE_TAG)) {
            revert BadSignature();
        }
    }

    // --- rules of a contest -----------------------------------------------------------------------------------------

    function _validateRecord(uint32 position, Record calldata record) private view returns (bytes32 hash) {
        hash = keccak256(abi.encode(record));
        if (recordHash(position) != hash) revert UnknownRound();
    }

    function _validateContestable(Place calldata place) private view {
        if (isFinal(place.position, place.record)) revert NotContestable();
        if (place.position > 0) _validateRecord(place.position - 1, place.previous);
    }

    function _validateLeaf(Statement calldata statement, uint32 index, RewardTree.Proof calldata proof) private pure {
        RewardTree.Node memory top = proof.root(index, statement.numLeaves);
        if (
            top.digest != statement.root || top.cumulative != statement.cumulative || top.reward != statement.reward
                || top.contribution != statement.contribution
        ) revert RewardTree.BadProof();
    }

    function _openDemand(uint256 number) private view returns (Demand storage demand) {
        if (number >= _demands.length) revert UnknownDemand();
        demand = _demands[number];
        if (!demand.isOpen) revert UnknownDemand();
    }

    /// @dev A fault is proven: slash who signed the round, void it and what follows. Returns the bounty, to be paid.
    function _condemn(address account, Place calldata place, Fault fault) private returns (uint256 bounty) {
        Statement calldata statement = place.record.statement;
        uint256 total = _slash(statement.epoch, place.record.absent);
        Head memory head = _head;
        Money memory money = _money;
        uint128 cumulative = 0;
        head.numRounds = place.position;
        head.progressAt = uint48(block.timestamp);
        if (place.position == 0) {
            (head.round, head.numLeaves, _headRoot) = (0, 0, 0);
        } else {
            Statement calldata previous = place.previous.statement;
            _validateRecord(place.position - 1, place.previous);
            (head.round, head.numLeaves, _headRoot) = (previous.round, previous.numLeaves, previous.root);
            cumulative = previous.cumulative;
        }
        _head = head;
        _money = Money(cumulative, money.pool + money.cumulative - cumulative);
        if (_times.from >= place.position) _times.until = 0;
        emit Voided(place.position, statement.round, head.nonce);
        return _split(account, statement.round, fault, total);
    }

    /// @dev Take the stakes of a committee's present seats. Whatever was signed and not accepted yet is dead, and so
    /// are the committees so far; a new draw is open at once.
    function _slash(uint32 epoch, uint256 absent) private returns (uint256 total) {
        uint32[] memory seats = _committees[epoch];
        for (uint256 seat = 0; seat < seats.length; ++seat) {
            if ((absent >> seat) & 1 == 1) continue;
            uint96 amount = _members[seats[seat]].stake;
            if (amount == 0) continue;
            total += amount;
            _members[seats[seat]].stake = 0;
            emit Slashed(seats[seat], amount);
        }
        _head.epochMin = _head.epoch + 1;
        ++_head.nonce;
        _times.rotatableAt = 0;
    }

    function _split(address account, uint48 round, Fault fault, uint256 total) private returns (uint256 bounty) {
        bounty = total / BOUNTY_DIVISOR;
        _money.pool += uint128(total - bounty);
        emit Contested(round, fault, account, bounty);
    }

    // --- members ----------------------------------------------------------------------------------------------------

    function _indexOf(address account) private view returns (uint32) {
        uint32 place = _places[account];
        if (place == 0) revert UnknownMember();
        return place - 1;
    }

    function _isLeaver(uint256 index) private view returns (bool) {
        return (_leaverBits[index >> 8] >> (index & 255)) & 1 == 1;
    }

    /// @dev Draws without replacement in proportion to stake: same as p2pfm/settlement/sampling.py.
    function _draw(uint256 count, uint32 epoch) private view returns (uint32[] memory drawn) {
        uint256[] memory urn = new uint256[](count);
        uint256 total = 0;
        uint256 numStaked = 0;
        uint256 leavers = 0;
        for (uint256 i = 0; i < count; ++i) {
            if (i & 255 == 0) leavers = _leaverBits[i >> 8];
            if ((leavers >> (i & 255)) & 1 == 1 && _lastEpochs[i] < epoch) continue;
            uint256 stake = _members[i].stake;
            if (stake == 0) continue;
            urn[i] = stake;
            total += stake;
            ++numStaked;
        }
        drawn = new uint32[](Math.min(numStaked, COMMITTEE_SIZE));
        for (uint256 rank = 0; rank < drawn.length; ++rank) {
            // The seed was fixed by the rotation before, with the candidates: a modulus of it picks, it draws no entropy.
            // slither-disable-next-line weak-prng
            uint256 ticket = uint256(keccak256(abi.encode(seed, rank))) % total;
            uint256 i = 0;
            while (ticket >= urn[i]) {
                ticket -= urn[i++];
            }
            drawn[rank] = uint32(i);
            total -= urn[i];
            urn[i] = 0;
        }
    }

    /// @dev The sum of the keys of all seats but those whose bit in `skipped` is set.
    function _sumKeys(uint32[] memory seats, uint256 skipped) private view returns (BLS381.G1 memory sum) {
        for (uint256 seat = 0; seat < seats.length; ++seat) {
            if ((skipped >> seat) & 1 == 1) continue;
            sum = sum.add(_members[seats[seat]].key.unpack());
        }
    }
}
