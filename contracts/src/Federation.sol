// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IFederation} from "./interfaces/IFederation.sol";
import {BLS381} from "./libraries/BLS381.sol";
import {RewardTree} from "./libraries/RewardTree.sol";

/// @title See IFederation. The same rules, in the same order, as InMemoryLedger.
contract Federation is IFederation {
    using SafeERC20 for IERC20;
    using BLS381 for BLS381.G1;
    using BLS381 for BLS381.PackedG1;

    struct Member {
        address account;
        uint96 stake;
        BLS381.PackedG1 key;
        string peer;
    }

    /// @dev reward and prevRoot follow from the record before.
    struct Record {
        bytes32 root;
        uint128 cumulative;
        uint64 round;
        uint64 acceptedAt;
        uint128 contribution;
        uint64 epoch;
        uint64 nonce;
        bytes32 data;
        bytes32 base;
    }

    uint256 public constant VERSION = 1;
    uint256 private constant PEER_BYTES_MAX = 128;
    /// @dev A rotation must not kill a round in flight.
    uint64 private constant EPOCH_LAG_MAX = 1;

    bytes private constant SIGNATURE_TAG = "BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_";
    bytes private constant POSSESSION_TAG = "BLS_POP_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_";
    bytes32 private constant POSSESSION_TYPEHASH =
        keccak256("Possession(uint256 chainId,address federation,address account,bytes32 peer,bytes32 key)");
    bytes32 private constant ROUND_TYPEHASH = keccak256(
        "Round(uint256 chainId,address federation,uint64 epoch,uint64 nonce,uint64 round,bytes32 prevRoot,bytes32 root,uint128 cumulative,uint128 reward,uint128 contribution,bytes32 data,bytes32 base)"
    );

    address public immutable token;
    uint32 private immutable COMMITTEE_SIZE;
    uint32 private immutable MEMBERS_MAX;
    uint96 private immutable MIN_STAKE;
    uint128 private immutable POOL_PER_EPOCH;
    uint64 private immutable ROUNDS_PER_EPOCH;
    uint64 private immutable CHALLENGE_WINDOW;
    uint64 private immutable ROTATION_PERIOD;
    uint64 private immutable RESTART_PERIOD;

    Member[] private _members;
    mapping(address account => bool) private _isAccountTaken;
    mapping(bytes32 peerHash => bool) private _isPeerTaken;
    mapping(bytes32 keyHash => bool) private _isKeyTaken;

    uint64 private _epoch;
    uint64 private _nonce;
    uint64 private _rotatedAt;
    uint64 private _progressAt;
    uint256 private _pool;
    bytes32 public seed;
    uint32 public numCandidates;

    mapping(uint64 epoch => uint32[]) private _committees;
    mapping(uint64 epoch => mapping(uint256 word => uint256)) private _committeeBits;
    mapping(uint64 epoch => BLS381.PackedG1) private _committeeKeys;

    Record[] private _rounds;
    mapping(uint32 index => uint256) public claimed;

    constructor(address token_, Params memory p) {
        if (p.committeeSize == 0 || p.minStake == 0 || p.roundsPerEpoch == 0 || p.membersMax < p.committeeSize) {
            revert BadParameter();
        }
        token = token_;
        COMMITTEE_SIZE = p.committeeSize;
        MEMBERS_MAX = p.membersMax;
        MIN_STAKE = p.minStake;
        POOL_PER_EPOCH = p.poolPerEpoch;
        ROUNDS_PER_EPOCH = p.roundsPerEpoch;
        CHALLENGE_WINDOW = p.challengeWindow;
        ROTATION_PERIOD = p.rotationPeriod;
        RESTART_PERIOD = p.restartPeriod;
        _progressAt = uint64(block.timestamp);
        seed = keccak256(abi.encode(block.prevrandao, blockhash(block.number - 1), address(this)));
    }

    // --- changes ----------------------------------------------------------------------------------------------------

    /// @inheritdoc IFederation
    function register(
        string calldata peer,
        uint256[4] calldata key,
        uint256[8] calldata possession,
        uint96 stake
    ) external returns (uint32 index) {
        bytes32 peerHash = keccak256(bytes(peer));
        bytes32 keyHash = keccak256(abi.encode(key));
        if (_members.length >= MEMBERS_MAX) revert RegistryFull();
        if (_isAccountTaken[msg.sender]) revert AlreadyRegistered();
        if (bytes(peer).length == 0 || bytes(peer).length > PEER_BYTES_MAX) revert BadPeer();
        if (_isPeerTaken[peerHash]) revert PeerTaken();
        if (_isKeyTaken[keyHash]) revert KeyTaken();
        if (stake < MIN_STAKE) revert StakeTooLow();
        BLS381.G1 memory point = BLS381.G1(key[0], key[1], key[2], key[3]);
        bytes32 message = possessionMessage(msg.sender, peer, key);
        if (!point.verify(message, possession, POSSESSION_TAG)) revert BadPossession();

        index = uint32(_members.length);
        _members.push(Member(msg.sender, stake, point.pack(), peer));
        _isAccountTaken[msg.sender] = true;
        _isPeerTaken[peerHash] = true;
        _isKeyTaken[keyHash] = true;
        emit Registered(index, msg.sender, peer, stake);
        IERC20(token).safeTransferFrom(msg.sender, address(this), stake);
    }

    /// @inheritdoc IFederation
    function rotate() external {
        uint256 count = _members.length;
        if (_epoch != 0 && block.timestamp < _rotatedAt + ROTATION_PERIOD) revert TooEarly();
        if (count == 0) revert NoMembers();
        bool isEverybody = count <= COMMITTEE_SIZE || _epoch == 0;
        uint64 epoch = ++_epoch;
        _rotatedAt = uint64(block.timestamp);
        uint32[] memory drawn = _draw(isEverybody ? count : numCandidates);
        _committees[epoch] = drawn;
        _committeeKeys[epoch] = _sumKeys(drawn).pack();
        for (uint256 i = 0; i < drawn.length; ++i) {
            _committeeBits[epoch][drawn[i] >> 8] |= 1 << (drawn[i] & 255);
        }
        seed = keccak256(abi.encode(seed, block.prevrandao, blockhash(block.number - 1)));
        numCandidates = uint32(count);
        emit Rotated(epoch, drawn);
    }

    /// @inheritdoc IFederation
    function fund(uint256 amount) external {
        _pool += amount;
        emit Funded(msg.sender, amount);
        IERC20(token).safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IFederation
    function submitRound(
        Statement calldata statement,
        uint32[] calldata absent,
        uint256[8] calldata signature
    ) external {
        _validatePlace(statement);
        _validateSums(statement);
        _validateCertificate(statement, absent, signature);
        _pool -= statement.reward;
        _progressAt = uint64(block.timestamp);
        _rounds.push(
            Record({
                root: statement.root,
                cumulative: statement.cumulative,
                round: statement.round,
                acceptedAt: uint64(block.timestamp),
                contribution: statement.contribution,
                epoch: statement.epoch,
                nonce: statement.nonce,
                data: statement.data,
                base: statement.base
            })
        );
        emit RoundAccepted(
            statement.round,
            statement.root,
            statement.cumulative,
            statement.reward,
            statement.contribution,
            statement.data,
            statement.base
        );
    }

    /// @inheritdoc IFederation
    function claim(
        uint256 position,
        uint32 index,
        RewardTree.Leaf calldata leaf,
        RewardTree.Node[] calldata siblings
    ) external returns (uint256 paid) {
        if (position >= _rounds.length) revert UnknownRound();
        Record storage record = _rounds[position];
        if (!_isFinal(record)) revert NotFinal();
        if (index >= _members.length) revert UnknownMember();
        RewardTree.Node memory top = RewardTree.root(leaf, index, siblings);
        uint128 before = position == 0 ? 0 : _rounds[position - 1].cumulative;
        if (
            top.digest != record.root || top.cumulative != record.cumulative
                || top.reward != record.cumulative - before || top.contribution != record.contribution
        ) revert BadProof();

        uint256 drawn = claimed[index];
        if (leaf.cumulative <= drawn) return 0;
        paid = leaf.cumulative - drawn;
        claimed[index] = leaf.cumulative;
        address account = _members[index].account;
        emit Claimed(index, account, record.round, paid);
        IERC20(token).safeTransfer(account, paid);
    }

    /// @inheritdoc IFederation
    function restartRound() external {
        if (block.timestamp < _progressAt + RESTART_PERIOD) revert TooEarly();
        uint256 numVoided;
        while (_rounds.length > 0 && !_isFinal(_rounds[_rounds.length - 1])) {
            _pool += _rewardAt(_rounds.length - 1);
            _rounds.pop();
            ++numVoided;
        }
        _progressAt = uint64(block.timestamp);
        emit Restarted(++_nonce, numVoided);
    }

    // --- reads ------------------------------------------------------------------------------------------------------

    /// @inheritdoc IFederation
    function params() external view returns (Params memory) {
        return Params({
            committeeSize: COMMITTEE_SIZE,
            membersMax: MEMBERS_MAX,
            minStake: MIN_STAKE,
            poolPerEpoch: POOL_PER_EPOCH,
            roundsPerEpoch: ROUNDS_PER_EPOCH,
            challengeWindow: CHALLENGE_WINDOW,
            rotationPeriod: ROTATION_PERIOD,
            restartPeriod: RESTART_PERIOD
        });
    }

    /// @inheritdoc IFederation
    function state() external view returns (State memory) {
        uint256 count = _rounds.length;
        return State({
            time: uint64(block.timestamp),
            epoch: _epoch,
            nonce: _nonce,
            numMembers: uint32(_members.length),
            numRounds: uint32(count),
            headRound: count == 0 ? 0 : _rounds[count - 1].round,
            headRoot: _rootBefore(count),
            pool: _pool
        });
    }

    /// @inheritdoc IFederation
    function members(uint256 first, uint256 count) external view returns (MemberView[] memory list) {
        uint256 end = _end(first, count, _members.length);
        list = new MemberView[](end - first);
        for (uint256 i = first; i < end; ++i) {
            Member memory member = _members[i];
            BLS381.G1 memory key = member.key.unpack();
            list[i - first] = MemberView({
                account: member.account,
                stake: member.stake,
                isActive: true,
                peer: member.peer,
                key: [key.xHigh, key.xLow, key.yHigh, key.yLow]
            });
        }
    }

    /// @inheritdoc IFederation
    function committee(uint64 epoch) external view returns (uint32[] memory) {
        return _committees[epoch];
    }

    /// @inheritdoc IFederation
    function rounds(uint256 first, uint256 count) external view returns (RoundView[] memory list) {
        uint256 end = _end(first, count, _rounds.length);
        list = new RoundView[](end - first);
        for (uint256 i = first; i < end; ++i) {
            Record memory record = _rounds[i];
            Statement memory statement = Statement({
                epoch: record.epoch,
                nonce: record.nonce,
                round: record.round,
                prevRoot: _rootBefore(i),
                root: record.root,
                cumulative: record.cumulative,
                reward: _rewardAt(i),
                contribution: record.contribution,
                data: record.data,
                base: record.base
            });
            list[i - first] = RoundView(statement, record.acceptedAt);
        }
    }

    /// @inheritdoc IFederation
    function possessionMessage(address account, string calldata peer, uint256[4] calldata key)
        public
        view
        returns (bytes32)
    {
        bytes32 peerHash = keccak256(bytes(peer));
        bytes32 keyHash = keccak256(abi.encode(key));
        return keccak256(
            abi.encode(POSSESSION_TYPEHASH, block.chainid, address(this), account, peerHash, keyHash)
        );
    }

    /// @inheritdoc IFederation
    function roundMessage(Statement calldata statement) public view returns (bytes32) {
        return keccak256(abi.encode(ROUND_TYPEHASH, block.chainid, address(this), statement));
    }

    // --- rules ------------------------------------------------------------------------------------------------------

    function _validatePlace(Statement calldata statement) private view {
        uint256 count = _rounds.length;
        uint64 epoch = statement.epoch;
        if (statement.nonce != _nonce) revert BadNonce();
        if (epoch == 0 || epoch > _epoch || epoch + EPOCH_LAG_MAX < _epoch) revert BadEpoch();
        if (count > 0 && statement.round <= _rounds[count - 1].round) revert StaleRound();
        if (statement.prevRoot != _rootBefore(count)) revert BadPrevRoot();
    }

    /// @dev What earlier epochs left over stays available, but never more than a round's budget at once.
    function _validateSums(Statement calldata statement) private view {
        uint256 count = _rounds.length;
        uint256 drawn = count == 0 ? 0 : _rounds[count - 1].cumulative;
        if (statement.cumulative != drawn + statement.reward) revert BadSums();
        uint256 numEpochs = uint256(statement.round) / ROUNDS_PER_EPOCH + 1;
        if (
            statement.reward > _pool || statement.reward > POOL_PER_EPOCH
                || statement.cumulative > POOL_PER_EPOCH * numEpochs
        ) revert OverBudget();
    }

    function _validateCertificate(
        Statement calldata statement,
        uint32[] calldata absent,
        uint256[8] calldata signature
    ) private view {
        uint64 epoch = statement.epoch;
        for (uint256 i = 0; i < absent.length; ++i) {
            if (i > 0 && absent[i] <= absent[i - 1]) revert BadAbsent();
            if ((_committeeBits[epoch][absent[i] >> 8] >> (absent[i] & 255)) & 1 == 0) revert BadAbsent();
        }
        uint256 size = _committees[epoch].length;
        if (size - absent.length < 2 * size / 3 + 1) revert BadQuorum();
        BLS381.G1 memory key = _committeeKeys[epoch].unpack();
        if (absent.length > 0) key = key.add(_sumKeys(absent).negate());
        if (!key.verify(roundMessage(statement), signature, SIGNATURE_TAG)) revert BadSignature();
    }

    /// @dev Draws without replacement in proportion to stake: same as p2pfm/settlement/sampling.py.
    function _draw(uint256 count) private view returns (uint32[] memory drawn) {
        uint256[] memory urn = new uint256[](count);
        uint256 total;
        for (uint256 i = 0; i < count; ++i) {
            urn[i] = _members[i].stake;
            total += urn[i];
        }
        drawn = new uint32[](count < COMMITTEE_SIZE ? count : COMMITTEE_SIZE);
        for (uint256 rank = 0; rank < drawn.length; ++rank) {
            uint256 ticket = uint256(keccak256(abi.encode(seed, rank))) % total;
            uint256 i;
            while (ticket >= urn[i]) {
                ticket -= urn[i++];
            }
            drawn[rank] = uint32(i);
            total -= urn[i];
            urn[i] = 0;
        }
    }

    function _sumKeys(uint32[] memory indices) private view returns (BLS381.G1 memory sum) {
        for (uint256 i = 0; i < indices.length; ++i) {
            sum = sum.add(_members[indices[i]].key.unpack());
        }
    }

    function _isFinal(Record storage record) private view returns (bool) {
        return block.timestamp >= record.acceptedAt + CHALLENGE_WINDOW;
    }

    function _rewardAt(uint256 position) private view returns (uint128) {
        return _rounds[position].cumulative - (position == 0 ? 0 : _rounds[position - 1].cumulative);
    }

    function _rootBefore(uint256 position) private view returns (bytes32) {
        return position == 0 ? bytes32(0) : _rounds[position - 1].root;
    }

    function _end(uint256 first, uint256 count, uint256 length) private pure returns (uint256) {
        if (first >= length) return first;
        return count > length - first ? length : first + count;
    }
}
